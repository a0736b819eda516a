"""The discriminator's room: empty so far, `distill.train.student_step` has its place."""
