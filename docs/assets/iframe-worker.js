// Search without a web server. Browsers refuse `new Worker(file://…)`, so on file:// pages the worker's
// script runs in a hidden iframe, and messages are passed by hand.
if (location.protocol === "file:") {
  window.IFrameWorker = class extends EventTarget {
    constructor(url) {
      super()
      this.waiting = []
      this.iframe = document.createElement("iframe")
      this.iframe.hidden = true
      document.body.appendChild(this.iframe)

      // The worker's postMessage and importScripts
      const inner = this.iframe.contentWindow
      const outer = this
      inner.postMessageToPage = data => outer.dispatchEvent(new MessageEvent("message", { data }))
      inner.eval("deliver = data => dispatchEvent(new MessageEvent('message', { data }))")
      inner.postMessage = inner.postMessageToPage
      inner.importScripts = (...urls) =>
        urls.reduce((previous, each) => previous.then(() => outer.load(each)), Promise.resolve())

      this.load(url).then(() => {
        this.ready = true
        this.waiting.splice(0).forEach(data => inner.deliver(data))
      })
    }

    load(url) {
      return new Promise((resolve, reject) => {
        const script = this.iframe.contentDocument.createElement("script")
        script.src = url
        script.onload = resolve
        script.onerror = reject
        this.iframe.contentDocument.body.appendChild(script)
      })
    }

    postMessage(data) {
      if (this.ready) this.iframe.contentWindow.deliver(data)
      else this.waiting.push(data)
    }

    terminate() {
      this.iframe.remove()
    }
  }
  window.Worker = window.IFrameWorker
}
