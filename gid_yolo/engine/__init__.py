"""The only place that subclasses Ultralytics: model, trainer, validator, predictor, exporter."""
