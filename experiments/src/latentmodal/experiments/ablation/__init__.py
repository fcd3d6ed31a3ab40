"""Many runs of one recipe, held comparable: axes, seeds, an equal budget, and what they show."""
