"""PMC inside other people's training code."""
