"""What fits, how many bytes move and how long a step takes, from sizes alone: ``lightning-tex plan``."""
