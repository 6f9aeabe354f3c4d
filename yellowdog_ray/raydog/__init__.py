"""Ray clusters on YellowDog."""
