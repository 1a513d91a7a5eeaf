"""The flags of other tools' training programs, as their own --help lists them: each is answered by what stands for it here."""

import re

import pytest

from fastflower.cli import main
from fastflower.suggestions import did_you_mean

TORCHRUN, EPOCHS, SCHEDULE = r"torchrun --nproc-per-node \d -m fastflower train s", "epochs 1", "--help schedule"
OPTIMIZER, NETWORK, LEAVE = "the optimizer has torch's defaults", "the backbone stays as", "leave it out"
LOG, BEST, VALIDATED = "history.csv", "checkpoint-best.pt", "every epoch is validated"
LOSS, RGB, ONCE, POLICY = (
    "the loss is cross-entropy",
    "images are RGB",
    "once in an epoch",
    "there is no policy of that kind",
)
SHARDS, SPLIT, LABELS = "the shards come without a flag", "pack divides the images", "pack reads labels"
PRETRAINED, CLASSES, CORES = "weights are pretrained by default", "the classes are those", "taskset"
CUDA, SIZE = "--device cuda", "--augment.size"

# By tool: its flags, by the flag or sentence that answers them. Flags of the same name are left out.
TOOLS: dict[str, dict[str, str]] = {
    "timm": {
        SHARDS: "data-dir dataset", LABELS: "class-map input-key target-key", "--backbone": "model",
        "--weights": "initial-checkpoint",
        EPOCHS: "train-num-samples val-num-samples epoch-repeats",
        LEAVE: "dataset-download pin-mem no-prefetcher channels-last fuser"
        " use-multi-epochs-loader save-images synchronize-step device-modules dataset-trust-remote-code no-resume-opt",
        SPLIT: "train-split val-split", PRETRAINED: "pretrained", CLASSES: "num-classes", TORCHRUN: "gp local_rank no-ddp-bb",
        SIZE: "img-size input-size", RGB: "in-chans input-img-mode interpolation train-interpolation",
        "--augment.resize": "crop-pct",
        "--augment.mean": "mean", "--augment.std": "std", "--batch-size": "b",
        "validation has no batch size": "vb validation-batch-size",
        "--accumulate": "grad-accum-steps", "--drop-path": "drop-connect", "--checkpointing": "grad-checkpointing",
        "--compile": "torchcompile torchscript",
        NETWORK: "fast-norm model-kwargs head-init-scale head-init-bias drop drop-block"
        " bn-momentum bn-eps",
        "--precision bfloat16": "amp amp-dtype amp-impl model-dtype", "--optimizer": "opt", "--momentum": "opt-betas",
        OPTIMIZER: "opt-eps opt-kwargs clip-mode", "--clip-norm": "clip-grad", "--schedule": "sched",
        "--lr": "lr-base",
        SCHEDULE: "sched-on-updates lr-base-size lr-base-scale lr-noise lr-noise-pct lr-noise-std lr-cycle-mul lr-cycle-decay"
        " lr-cycle-limit lr-k-decay warmup-lr min-lr warmup-prefix cooldown-epochs", "--resume": "start-epoch",
        "--step-epochs": "decay-milestones decay-epochs", "--patience": "patience-epochs", "--gamma": "decay-rate",
        "--augment.crop None --augment.flip 0": "no-aug", "--augment.crop": "train-crop-mode", "--augment.scale": "scale",
        "--augment.crop-ratio": "ratio", "--augment.flip": "hflip", "--augment.flip-vertical": "vflip",
        "--augment.brightness": "color-jitter", "--augment.jitter-probability": "color-jitter-prob",
        "--augment.grayscale": "grayscale-prob", POLICY: "aa aug-splits gaussian-blur-prob", "--augment.erase": "reprob",
        ONCE: "aug-repeats remode recount resplit worker-seeding",
        LOSS: "jsd-loss bce-loss bce-sum bce-target-thresh bce-pos-weight",
        "--augment.mixup": "mixup mixup-prob mixup-switch-prob mixup-mode mixup-off-epoch",
        "--augment.cutmix": "cutmix cutmix-minmax",
        "--label-smoothing": "smoothing", "--sync-batchnorm": "sync-bn dist-bn split-bn",
        "--ema": "model-ema model-ema-force-cpu model-ema-decay model-ema-warmup", CORES: "j workers",
        LOG: "log-interval log-wandb wandb-project wandb-tags wandb-resume-id", "--save-steps": "recovery-interval",
        BEST: "checkpoint-hist", "--out": "output experiment", "highest validation accuracy": "eval-metric",
        "there is no distillation": "kd-model-name",
    },
    "torchvision": {
        SHARDS: "data-path", "--backbone": "model", "--batch-size": "b", CORES: "j workers", "--optimizer": "opt",
        "--weight-decay": "wd", OPTIMIZER: "norm-weight-decay bias-weight-decay transformer-embedding-decay",
        "--augment.mixup": "mixup-alpha", "--augment.cutmix": "cutmix-alpha", "--schedule": "lr-scheduler",
        "--warmup-epochs": "lr-warmup-epochs", SCHEDULE: "lr-warmup-method lr-warmup-decay lr-min",
        "--step-epochs": "lr-step-size",
        "--gamma": "lr-gamma", LOG: "print-freq", "--out": "output-dir", "--resume": "start-epoch",
        LEAVE: "cache-dataset use-deterministic-algorithms backend use-v2", "--sync-batchnorm": "sync-bn",
        "fastflower evaluate CHECKPOINT s": "test-only", POLICY: "auto-augment ra-magnitude augmix-severity",
        "--augment.erase": "random-erase", "--precision bfloat16": "amp", TORCHRUN: "world-size dist-url",
        "--ema": "model-ema model-ema-steps model-ema-decay", RGB: "interpolation", "--augment.resize": "val-resize-size",
        SIZE: "val-crop-size train-crop-size", "--clip-norm": "clip-grad-norm", ONCE: "ra-sampler ra-reps",
    },
    "ultralytics": {
        "--backbone": "model", SHARDS: "data", "no time limit": "time", "--batch-size": "batch", SIZE: "imgsz",
        "--out": "project name save",
        "--save-steps": "save_period",
        LEAVE: "cache deterministic single_cls rect tracker conf iou max_det dnn box dfl pose kobj"
        " overlap_mask mask_ratio", CORES: "workers", "never overwritten": "exist_ok", PRETRAINED: "pretrained",
        LOG: "verbose plots save_json show", CLASSES: "classes", "--schedule": "cos_lr", "--precision bfloat16": "amp",
        EPOCHS: "fraction",
        "fastflower doctor s": "profile", "--sizes": "multi_scale", NETWORK: "dropout", "train always validates": "val",
        "--precision float16": "half", "--lr": "lr0", SCHEDULE: "lrf warmup_bias_lr", "--momentum": "warmup_momentum",
        LOSS: "cls",
        "--accumulate": "nbs", "--augment.hue": "hsv_h", "--augment.saturation": "hsv_s", "--augment.brightness": "hsv_v",
        "--augment.rotate": "degrees", "--augment.translate": "translate", "--augment.scale": "scale",
        "--augment.shear": "shear",
        POLICY: "perspective bgr mosaic copy_paste auto_augment close_mosaic", "--augment.flip-vertical": "flipud",
        "--augment.flip": "fliplr", "--augment.mixup": "mixup", "--augment.erase": "erasing", "--augment.crop": "crop_fraction",
        "--recipe": "cfg",
    },
    "Lightning": {
        "--epochs": "trainer.max_epochs max_epochs", TORCHRUN: "trainer.strategy trainer.num_nodes",
        CUDA: "trainer.accelerator",
        "--accumulate": "trainer.accumulate_grad_batches", "--clip-norm": "trainer.gradient_clip_val",
        "--batch-size": "data.batch_size",
        "--lr": "model.lr model.learning_rate", OPTIMIZER: "gradient_clip_algorithm",
        "--sync-batchnorm": "trainer.sync_batchnorm",
        EPOCHS: "fast_dev_run limit_train_batches limit_val_batches overfit_batches max_steps min_epochs",
        "no time limit": "max_time",
        VALIDATED: "val_check_interval check_val_every_n_epoch", LOG: "log_every_n_steps enable_progress_bar trainer.logger",
        LEAVE: "benchmark deterministic num_sanity_val_steps detect_anomaly plugins reload_dataloaders_every_n_epochs",
        BEST: "enable_checkpointing trainer.callbacks", "--out": "default_root_dir", "fastflower doctor s": "trainer.profiler",
        "--resume": "ckpt_path", "is searched for": "auto_lr_find auto_scale_batch_size",
    },
    "Trainer": {
        "--backbone": "model_name_or_path", SHARDS: "train_dir validation_dir dataset_name", SPLIT: "train_val_split",
        EPOCHS: "max_train_samples max_eval_samples max_steps", "--out": "output_dir logging_dir",
        "never overwritten": "overwrite_output_dir",
        LEAVE: "do_train dataloader_drop_last dataloader_pin_memory remove_unused_columns push_to_hub"
        " ignore_mismatched_sizes cache_dir",
        "train always validates": "do_eval", VALIDATED: "do_predict evaluation_strategy eval_strategy eval_steps",
        "--batch-size": "per_device_train_batch_size", "validation has no batch size": "per_device_eval_batch_size",
        "--lr": "learning_rate", "--momentum": "adam_beta1", OPTIMIZER: "adam_beta2 adam_epsilon",
        "--clip-norm": "max_grad_norm",
        "--epochs": "num_train_epochs", "--schedule": "lr_scheduler_type", "--warmup-epochs": "warmup_ratio warmup_steps",
        LOG: "logging_strategy logging_steps report_to", "--precision float16": "fp16 fp16_opt_level half_precision_backend",
        "--precision bfloat16": "bf16", "--precision float32": "tf32", TORCHRUN: "local_rank ddp_backend deepspeed fsdp",
        BEST: "save_strategy save_total_limit load_best_model_at_end", "highest validation accuracy": "metric_for_best_model",
        "--checkpointing": "gradient_checkpointing", LABELS: "image_column_name label_column_name", "--optimizer": "optim",
        "--compile": "torch_compile", "--resume": "resume_from_checkpoint", "--label-smoothing": "label_smoothing_factor",
        "is searched for": "auto_find_batch_size", ONCE: "group_by_length", "--device cpu": "no_cuda use_cpu",
    },
    "Keras and fastai": {
        SPLIT: "validation_split valid_pct", SHARDS: "validation_data", ONCE: "shuffle", "--balanced": "class_weight",
        "--resume": "initial_epoch", EPOCHS: "steps_per_epoch validation_steps", VALIDATED: "validation_freq",
        LEAVE: "use_multiprocessing max_queue_size metrics", "--augment.rotate": "rotation_range max_rotate",
        "--augment.translate": "width_shift_range height_shift_range", "--augment.scale": "zoom_range max_zoom",
        "--augment.flip": "horizontal_flip do_flip", "--augment.flip-vertical": "vertical_flip flip_vert",
        "--augment.brightness": "brightness_range max_lighting", "--augment.shear": "shear_range max_warp",
        "--augment.fill": "fill_mode", "--augment.mean": "featurewise_center rescale",
        POLICY: "zca_whitening channel_shift_range",
        SIZE: "target_size", LABELS: "class_mode label_col fn_col", "--batch-size": "bs",
        "flag of its own": "item_tfms batch_tfms",
        "--augment.affine-probability": "p_affine", "--augment.jitter-probability": "p_lighting", "--lr": "lr_max base_lr",
        "--weight-decay": "wd", OPTIMIZER: "wd_bn_bias", "--freeze": "freeze_epochs unfreeze", LOSS: "loss_func loss",
        BEST: "cbs callbacks",
        "--epochs": "n_epoch", SCHEDULE: "div pct_start", "--momentum": "moms", "--backbone": "arch",
    },
    "torchrun": {TORCHRUN: "nproc_per_node nnodes node_rank master_addr master_port rdzv_endpoint ddp distributed"},
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_each_flag_of_another_tool_is_answered(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [(flag, answer) for answer, flags in TOOLS[tool].items() for flag in flags.split()]
    typed = [f"-{flag}" if len(flag) < 3 and flag in ("b", "j", "vb") else f"--{flag}" for flag, _ in asked]
    with pytest.raises(SystemExit, match=r"^2$"):
        main(["train", "s", *typed])
    lines = capsys.readouterr().err.removeprefix("error: ").splitlines()
    assert len(lines) == len(asked)
    for line, name, (flag, answer) in zip(lines, typed, asked, strict=True):
        expected = f"did you mean {answer}?" if answer.startswith("--") and answer != SCHEDULE else answer
        pattern = expected if answer == TORCHRUN else re.escape(expected)
        assert line.startswith(f"unknown flag {name}; "), flag
        assert re.search(pattern, line), (expected, line)


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("train s --gpus 2", "torchrun --nproc-per-node 2 -m fastflower train s."),
        ("train s --gpus=4", "torchrun --nproc-per-node 4 -m fastflower train s."),
        ("train s --devices 0,1,2", "torchrun --nproc-per-node 3 -m fastflower train s."),
        ("train s --nproc 2", "torchrun --nproc-per-node 2 -m fastflower train s."),
        ("train s --nproc-per-gpu 4", "torchrun --nproc-per-node 4 -m fastflower train s."),
        ("train s --num-gpus 2", "torchrun --nproc-per-node 2 -m fastflower train s."),
        ("train s --ngpu 2", "torchrun --nproc-per-node 2 -m fastflower train s."),
        ("train --gpus 2 s", "torchrun --nproc-per-node 2 -m fastflower train SHARDS."),
        ("train s --nproc_per_node 8", "torchrun --nproc-per-node 8 -m fastflower train s."),
        ("train s --local_rank 0", "torchrun --nproc-per-node 2 -m fastflower train s."),
        ("train s --gpus 1", "did you mean --device cuda?"),
        ("train s --gpus", "did you mean --device cuda?"),
        ("train s --gpu 1", "did you mean --device cuda:1?"),
        ("evaluate c s --gpus 2", "did you mean --device cuda?"),
        ("evaluate c s --no-cuda", "did you mean --device cpu?"),
        ("predict c i --half", "did you mean --precision float16?"),
        ("train s --augment flip", "did you mean --augment.flip 0.5?"),
        ("train s --augment=hflip", "did you mean --augment.flip 0.5?"),
        ("train s --augment roate", "did you mean --augment.rotate 15?"),
        ("train s --augment strong", "each augmentation has a flag of its own, for example --augment.flip 0.5."),
        ("evaluate c s --augment", "did you mean --tta?"),
    ],
)
def test_what_follows_a_flag_counts(typed: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^2$"):
        main(typed.split())
    assert capsys.readouterr().err.endswith(f"{answer}\n")


@pytest.mark.parametrize("command", ["train", "evaluate", "preview", "doctor"])
@pytest.mark.parametrize("flag", ["--labels", "--ignore", "--drop-empty-classes"])
def test_a_flag_of_pack_is_sent_there(command: str, flag: str) -> None:
    what = f"it is a flag of pack: pack first (fastflower pack FOLDER {flag} ... --out shards), then pass shards."
    assert did_you_mean(command, flag, "", {"--out": ""}, "data") == f"unknown flag {flag}; {what}"
