"""The discriminator, grown from the teacher, and the losses it is played by."""
