"""Prediction of many images, of videos and of data sets."""
