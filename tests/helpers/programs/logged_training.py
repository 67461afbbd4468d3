"""Train two epochs with TensorBoard, MLflow and Weights & Biases on. Arguments: teacher, student, data set, folder."""

import sys

from ultralytics import settings

from yolokd import YoloDistiller

ON = ("tensorboard", "mlflow", "wandb")
settings.update({name: name in ON for name in ("clearml", "comet", "dvc", "raytune", *ON)})
teacher, student, data, folder = sys.argv[1:]
YoloDistiller(teacher=teacher, student=student, method="fitnet", level_floor=0.1).train(
    data=data, project=folder, name="logged", epochs=2, imgsz=64, batch=4, nbs=4, plots=False, verbose=False,
    device="cpu", check_teacher=False, report=False, teacher_precision="fp32", val=False,
)  # fmt: skip
