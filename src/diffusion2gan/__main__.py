from diffusion2gan.cli import main

main()
