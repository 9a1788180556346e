"""Rankers taught by rankers: collections, teacher scores, mining, models, losses, measures. No torch."""
