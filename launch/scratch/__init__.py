"""Small models trained from scratch on given texts: a generator and classifiers, for trying a recipe out."""
