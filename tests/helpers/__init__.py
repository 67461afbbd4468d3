"""Helpers that tests import: models, data sets, trainings, results, the command line and slow references."""
