"""Every name of Ultralytics or torch that yolokd replaces; each is replaced inside a `with` block only.

- `patched.patched`: the tool that all others use; replaces one attribute. `Converted` replaces assigned values.
- `safe_loading.safe_loading`: models and data sets run no code; it holds safe_models, safe_label_caches,
  no_ghostscript and no_autoinstall.
- `safe_models.safe_models`: model files run no code.
- `safe_models.own_exports`: files that this process has exported run all the same.
- `tensor_sizes.checked_tensor_sizes`: a checkpoint takes no more memory than its file holds.
- `label_cache.safe_label_caches`: label caches run no code.
- `no_ghostscript.no_ghostscript`: images run no other program.
- `no_autoinstall.no_autoinstall`: no packages are installed.
- `safe_imports.safe_imports`: new processes import nothing from the working folder.
- `image_names.any_image_name`: predictions are saved under names that are not UTF-8.
- `training_loop.bfloat16_on_cpu`: `amp=bf16` works on CPUs.
- `training_loop.atomic_stripping`: a finished checkpoint is never left half written.
- `training_loop.adapters_left_out`: loggers count, and quantization changes, the student's own layers only.
- `no_loggers.no_loggers`: measurements start no run of MLflow, Weights & Biases or the like.
- `ddp_on_cpu.ddp_on_cpu`: several processes train on CPUs.

Each docstring says what is replaced, why, and what would make the replacement unnecessary.
"""
