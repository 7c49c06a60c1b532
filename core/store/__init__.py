"""Where models come from and where they lie: references, the models directory, verification, publishing."""
