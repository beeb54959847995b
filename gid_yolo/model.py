"""`GID`, the one object of the Python interface: train, val, predict, export, benchmark."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from ultralytics.engine.model import Model
from ultralytics.nn.tasks import DetectionModel

from gid_yolo.cfg import model_names
from gid_yolo.data.synthetic import is_embedded, synthetic_dataset
from gid_yolo.engine.checkpoint import is_checkpoint, load_model
from gid_yolo.engine.classes import check_classes, fit_classes
from gid_yolo.engine.config import (
    DEFAULTS,
    check_keys,
    check_weights,
    thresholds,
    without_none,
    yolo_defaults,
)
from gid_yolo.engine.data_set import resolve_data
from gid_yolo.engine.detection_model import GIDDetectionModel
from gid_yolo.engine.device import check_device
from gid_yolo.engine.distillation import check_named_teacher
from gid_yolo.engine.foreign import SUFFIXES
from gid_yolo.engine.idle import tell_idle
from gid_yolo.engine.modes import check_use, with_defaults
from gid_yolo.engine.named_data import check_named
from gid_yolo.engine.origin import check_kind
from gid_yolo.engine.place import check_place
from gid_yolo.engine.predictor import GIDPredictor
from gid_yolo.engine.recipe import expand
from gid_yolo.engine.safe_load import safely
from gid_yolo.engine.schedule import override
from gid_yolo.engine.teacher import resolve_teacher
from gid_yolo.engine.trainer import GIDTrainer
from gid_yolo.engine.validator import GIDValidator
from gid_yolo.engine.values import check_values
from gid_yolo.engine.yolo_config import yolo_config
from gid_yolo.engine.yolo_trainer import YOLOTrainer
from gid_yolo.engine.yolo_view import is_yolo
from gid_yolo.errors import UserError
from gid_yolo.scalars import as_python


class GID(Model):
    """A detector to train, evaluate, run and deploy.

    Args:
        model: A model name (`retina_nano`), a model yaml, a YOLO yaml of Ultralytics (`yolo11n.yaml`), a checkpoint
            (`best.pt`), or an ONNX file to validate and predict with.
        task: Always `detect`; taken for Ultralytics' sake.
        verbose: Log a summary of a new model.
        trust: Open checkpoints, this one and those that a mode is given, even if that can run code.

    Examples:
        >>> from gid_yolo import GID
        >>> GID("retina_nano").train(teacher="retina_small", epochs=40)  # on the embedded data
        >>> GID("best.pt").export(imgsz=320)
    """

    trust = False

    columns: dict[str, float] | None = None  # the ten columns of the last validation
    _file: Any = None  # what an ONNX file says of itself

    def __init__(
        self,
        model: str | Path = "retina_nano",
        task: str | None = None,
        verbose: bool = False,
        trust: bool = False,
    ) -> None:
        self.__dict__["trust"] = trust is True  # before Ultralytics' constructor, which loads
        name = str(model)
        as_yaml = f"{name}.yaml"
        known = name in model_names() or Path(as_yaml).is_file() or yolo_config(as_yaml) is not None
        if Path(name).is_dir() and not known:
            raise UserError(f"model={name} is a folder: give a file in it, such as weights/best.pt of a run.")
        if Path(name).is_file() and not known and Path(name).suffix == "":
            raise UserError(f"model={name} is a file without an ending: rename it to {name}.pt, or .onnx as it may be.")
        if Path(name).suffix == "":
            name = as_yaml  # Ultralytics would take a bare name for a checkpoint
        super().__init__(model=name, task="detect", verbose=verbose)

    def _new(self, cfg: str, task: str | None = None, verbose: bool = False) -> None:
        self.task = "detect"
        if (yolo := yolo_config(cfg)) is not None:
            self.cfg, defaults = cfg, yolo_defaults()
            self.model = DetectionModel(yolo, verbose=verbose)
        else:
            config = cfg if Path(cfg).is_file() else Path(cfg).stem
            self.cfg, defaults = str(config), DEFAULTS
            self.model = GIDDetectionModel(config, verbose=verbose)
        self.overrides.update(model=self.cfg, task=self.task)
        self.model.args = {**defaults, **self.overrides}
        self.model_name = self.cfg

    def _load(self, weights: str, task: str | None = None) -> None:
        if not is_checkpoint(weights):
            if not Path(weights).is_file() or Path(weights).suffix.lower() != ".onnx":
                raise UserError(
                    f"model={weights} cannot be used: give a model name, or an existing .pt, .pth, .pkl or .onnx file."
                )
            from gid_yolo.export.metadata import read_info
            from gid_yolo.export.providers import start

            self._file = read_info(start(weights, "cpu", 1), weights)  # or why it cannot be used
            super()._load(weights, task="detect")
            return
        self.model, self.ckpt = load_model(weights, trust=self.trust)
        self.task = "detect"
        self.overrides = self.model.args = self._reset_ckpt_args(self.model.args)
        self.ckpt_path = self.model.pt_path
        self.overrides.update(model=str(weights), task=self.task)
        self.model_name = str(weights)

    @property
    def task_map(self) -> dict[str, dict[str, Any]]:
        """Ultralytics' hook: which class does what."""
        yolo = is_yolo(self.model)
        return {
            "detect": {
                "model": DetectionModel if yolo else GIDDetectionModel,
                "trainer": YOLOTrainer if yolo else GIDTrainer,
                "validator": GIDValidator,
                "predictor": GIDPredictor,
            }
        }

    def _thresholds(self) -> dict[str, Any]:
        """`conf`, `iou` and `max_det` of the loaded model, or those that an ONNX file says."""
        return thresholds(self.model.yaml) if isinstance(self.model, DetectionModel) else dict(self._file.limits)

    def train(self, trainer: Any = None, **kwargs: Any) -> Any:
        """Train; with `teacher=`, distil. Arguments are Ultralytics' and those of `cfg/default.yaml`.

        `recipe=` takes arguments from a recipe: over those of the model's yaml, under those that are given here.
        Without `data=` a checkpoint's own is used, and for a new model the embedded one. A teacher given by name is
        looked up, and trained first where it is not found.

        Raises:
            UserError: Arguments or data that cannot work, said before anything is trained.
        """
        self._check_is_pytorch_model()
        kwargs = as_python(kwargs)
        family, given = "yolo" if is_yolo(self.model) else self.model.yaml["detector"], without_none(kwargs)
        kwargs = {"trust": self.trust} | without_none(expand(kwargs, family))
        check_keys(kwargs)
        check_device(kwargs.get("device"))
        if kwargs.get("resume") is True and not kwargs.get("data"):
            self._named_data(kwargs["trust"])
        data = kwargs.get("data") or self.overrides.get("data")
        if kwargs.get("resume") and data and (kwargs.get("data") or is_embedded(data)):  # which may have moved
            kwargs["data"] = str(resolve_data(data))
        if not kwargs.get("resume"):
            check_values(kwargs, training=True)
            check_weights(kwargs)
            self._check_start(given, kwargs, family)  # before a teacher is trained
            kwargs["data"] = str(resolve_data(kwargs.get("data") or self._named_data(kwargs["trust"])))
            if kwargs.get("teacher") and kwargs.get("distill") != "none":
                kwargs["teacher"] = str(resolve_teacher(kwargs["teacher"], kwargs["data"], kwargs))
        with safely(kwargs["trust"]):
            return super().train(trainer, **kwargs)

    def _check_start(self, given: dict[str, Any], args: dict[str, Any], family: str) -> None:
        """Check what needs neither data nor teacher."""
        trainer = self.task_map["detect"]["trainer"]
        defaults = trainer.defaults_for(self.overrides["model"], args["trust"])
        args = {**args, "model": self.overrides["model"], "task": "detect", "mode": "train"}
        trainer.check_given(args)
        merged = override(defaults, args)
        check_place(merged)
        check_named_teacher(merged, family)
        tell_idle(given, merged, defaults)
        if isinstance(args.get("pretrained"), str | Path):  # which Ultralytics opens
            weights, _ = load_model(args["pretrained"], "pretrained", args["trust"])
            if self.ckpt:  # else the trainer looks, and opens what Ultralytics does not
                check_kind(weights, family, args["pretrained"])
                if Path(args["pretrained"]).suffix.lower() in SUFFIXES:
                    raise UserError(
                        f"pretrained={args['pretrained']} holds another library's weights, which a model that is a "
                        "checkpoint itself does not begin with: give them as model=, or a model's name beside them."
                    )

    def val(self, validator: Any = None, **kwargs: Any) -> Any:
        """Validate: Ultralytics' metrics, and the paper's ten columns as a row and as `coco_metrics.json`.

        A model that knows more classes than the data is measured on those of the data, see `fit_classes`.

        Returns:
            Ultralytics' metrics; `self.columns` holds the ten columns.
        """
        check_keys(kwargs)
        kwargs = {**self._thresholds(), **as_python(kwargs)}
        from gid_yolo.export.evaluate import read_data  # onnxruntime and its like: only where they are needed
        from gid_yolo.export.metadata import check_names, chosen_size

        check_values(kwargs)
        check_use("val", kwargs)
        with_defaults(kwargs)
        check_device(kwargs.get("device"))
        trained = isinstance(self.model, DetectionModel)
        data = kwargs.get("data") or self._named_data(self.trust)
        if data is None and not trained:
            raise UserError(f"data= is missing: say on which data {self.model_name} is to be validated.")
        path, contents = read_data(data, kwargs.get("split") or "val", self.trust)
        kwargs["data"] = str(path)
        check_classes(kwargs.get("classes"), contents["names"])
        model = self.model
        if trained and not kwargs.get("single_cls"):
            model = fit_classes(model, contents["names"], f"model={self.model_name}", path)
        if not trained:
            if not kwargs.get("single_cls"):
                check_names(self._file, contents["names"], f"model={self.model_name}", path)
            kwargs["imgsz"] = max(chosen_size(self._file, kwargs.get("imgsz"), self.model_name))  # one number, here
        made = (validator or self._smart_load("validator"))(
            args={**self.overrides, "rect": True, **kwargs, "mode": "val"}, _callbacks=self.callbacks
        )
        with safely(self.trust):
            made(model=deepcopy(model) if model is self.model and trained else model)  # it is fused for inference
        self.metrics, self.columns = made.metrics, made.columns
        return made.metrics

    def predict(self, source: Any = None, stream: bool = False, predictor: Any = None, **kwargs: Any) -> Any:
        """Detect objects in images, folders or videos; `source` as Ultralytics takes it."""
        check_keys(kwargs)
        kwargs = as_python(kwargs)
        check_values(kwargs)
        check_use("predict", kwargs)
        with_defaults(kwargs)
        check_device(kwargs.get("device"))
        asked = [key for key in ("embed", "visualize") if kwargs.get(key)]
        if isinstance(self.model, GIDDetectionModel) and asked:
            raise UserError(f"{asked[0]}= reads layers of a YOLO, which {self.model_name} has not: leave it out.")
        if self._file is not None:
            from gid_yolo.export.metadata import chosen_size

            kwargs["imgsz"] = list(chosen_size(self._file, kwargs.get("imgsz"), self.model_name))
        check_classes(kwargs.get("classes"), self.model.names if self._file is None else self._file.names)
        own = {key: value for key, value in self._thresholds().items() if key != "conf"}  # Ultralytics' is 0.25
        results = self._results(source, predictor, **{**own, **kwargs})
        return results if stream else list(results)

    def _results(self, source: Any, predictor: Any, **kwargs: Any) -> Iterator[Any]:
        with safely(self.trust):
            results = super().predict(source, True, predictor, **kwargs)
        while True:
            with safely(self.trust):  # not while the caller has the result
                result = next(results, None)
            if result is None:
                return
            yield result

    def export(self, **kwargs: Any) -> str:
        """Write an ONNX file, `file=` or one beside the checkpoint, and return its path: `gid_yolo.export.to_onnx`."""
        self._check_is_pytorch_model()
        check_keys(kwargs)
        kwargs = as_python(kwargs)
        check_values(kwargs)
        check_use("export", kwargs)
        check_device(kwargs.get("device"))
        file = kwargs.pop("file", None)
        from gid_yolo.export.to_onnx import export

        known = {key: self.overrides[key] for key in ("imgsz", "data") if self.overrides.get(key) is not None}
        measured = kwargs.get("int8") or str(kwargs.get("quantize")).lower() in {"8", "int8"}  # on images
        if measured and "data" not in kwargs:
            self._named_data(self.trust)
        if kwargs.get("data") is not None and not measured:
            raise UserError(f"data={kwargs['data']} holds the images of quantize=8: leave it out, or add that.")
        with safely(self.trust):
            return str(export(self.model, {"imgsz": 640, "batch": 1, **known, **kwargs}, file and Path(file)))

    def benchmark(self, **kwargs: Any) -> Any:
        """Compare this model's ONNX file with those of `baseline=` and `teacher=`: latency against accuracy."""
        from gid_yolo.export.benchmark import benchmark

        kwargs = {"trust": self.trust, **as_python(kwargs)}
        if kwargs.get("data") is None:
            kwargs["data"] = self._named_data(kwargs["trust"])
        with safely(kwargs["trust"]):
            return benchmark(model=self.ckpt_path or self.model_name, **kwargs)

    def visualize(self, teacher: str | Path, source: str | Path, **kwargs: Any) -> list[Path]:
        """Draw the general instances of images and the heat map of the GI score: figure 4 of the paper."""
        from gid_yolo.analysis.visualize import visualize

        kwargs = {"trust": self.trust, **as_python(kwargs)}
        with safely(kwargs["trust"]):
            return visualize(model=self.ckpt_path or self.model_name, teacher=teacher, source=source, **kwargs)

    def load(self, weights: Any = "yolo26n.pt", trust: bool | None = None) -> GID:
        """Take over weights by name and shape, of a file or of a model; files are read as data, see `trust`.

        Raises:
            UserError: The file is no checkpoint, or could run code.
        """
        if not isinstance(weights, str | Path):
            return super().load(weights)
        model, ckpt = load_model(weights, "weights", self.trust if trust is None else trust)
        super().load(model)
        self.ckpt, self.ckpt_path = ckpt, model.pt_path
        return self

    def tune(self, *args: Any, **kwargs: Any) -> Any:
        """Not to be had.

        Raises:
            UserError: Always: it trains by Ultralytics' command line, which opens files plainly.
        """
        raise UserError("tune() is not part of gid-yolo: train with the values that are to be compared, or gid-study.")

    def _check_is_pytorch_model(self) -> None:
        """Ultralytics' check, before what an exported file cannot do, in one sentence."""
        if isinstance(self.model, str | Path):
            raise UserError(
                f"model={self.model_name} is an ONNX file, which gid-val and gid-predict take: give the checkpoint it "
                "was made from."
            )

    def _named_data(self, trust: Any) -> Any:
        """The data that the checkpoint names."""
        data = self.overrides.get("data")
        if is_embedded(data) and not Path(data).is_file():
            return str(synthetic_dataset())
        if trust is not True:
            check_named(data, f"model={self.model_name}")
        return data
