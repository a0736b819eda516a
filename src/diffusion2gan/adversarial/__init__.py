"""The discriminator, initialised from the teacher, and the losses of the adversarial training."""
