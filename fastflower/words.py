"""What users of timm, torchvision's references, ultralytics, fastai, Lightning, Keras, Trainer and others type."""

TRAINS = ("train", "doctor", "preview")
_TAKE_SHARDS = (*TRAINS, "evaluate", "verify")
_THREADS = (
    "all cores that the process may use are used; to use fewer, type taskset -c 0-3 fastflower {command} {places}"
)

TORCHRUN = "one process trains on each GPU: torchrun --nproc-per-node {count} -m fastflower train {places}"

MEANINGS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        TRAINS,
        "--batch-size",
        "b bs batch train-batch-size per-device-train-batch-size per-gpu-train-batch-size batchsize imgs-per-gpu train-bs",
    ),
    (
        TRAINS,
        "--backbone",
        "a m arch architecture model model-name model-arch net network encoder cnn base-model model-name-or-path timm-model",
    ),
    (TRAINS, "--weight-decay", "wd decay l2 l2-reg weight-decay-rate"),
    (TRAINS, "--lr", "learning-rate learningrate lr0 base-lr lr-max max-lr init-lr initial-lr lr-base blr"),
    (TRAINS, "--epochs", "e ep n-epochs num-epochs nb-epochs max-epochs num-train-epochs epoch n-epoch"),
    (TRAINS, "--optimizer", "opt optim optimizer-name optimizer-type"),
    (
        TRAINS,
        "--schedule",
        "sched scheduler lr-scheduler lr-schedule lr-scheduler-type lr-policy lr-decay cos-lr cosine lr-strategy",
    ),
    (TRAINS, "--warmup-epochs", "warmup warm-up lr-warmup-epochs warmup-steps warmup-ratio num-warmup-steps wu"),
    (
        TRAINS,
        "--step-epochs",
        "lr-step-size step-size decay-epochs lr-decay-epochs lr-steps milestones decay-milestones",
    ),
    (TRAINS, "--gamma", "lr-gamma decay-rate lr-decay-rate"),
    (TRAINS, "--clip-norm", "clip-grad clip-grad-norm max-grad-norm gradient-clip-val grad-clip clip max-norm"),
    (
        TRAINS,
        "--accumulate",
        "grad-accum grad-accum-steps gradient-accumulation-steps accumulate-grad-batches nbs accum-iter",
    ),
    (
        TRAINS,
        "--ema",
        "model-ema ema-decay model-ema-decay use-ema model-ema-warmup model-ema-steps model-ema-force-cpu",
    ),
    (TRAINS, "--label-smoothing", "smoothing label-smoothing-factor ls"),
    (
        (*TRAINS, "predict"),
        "--precision bfloat16",
        "amp bf16 mixed-precision dtype amp-dtype use-amp native-amp apex-amp amp-impl autocast model-dtype",
    ),
    (
        (*TRAINS, "predict"),
        "--precision float16",
        "fp16 half fp16-opt-level half-precision-backend opt-level half-precision",
    ),
    (
        (*TRAINS, "predict"),
        "--precision float32",
        "no-amp fp32 tf32 full-precision",
    ),
    (TRAINS, "--compile", "torchcompile torch-compile torchcompile-mode torchscript jit"),
    (TRAINS, "--balanced", "class-weights weighted-sampler balance oversample cls-weights class-weight weighted"),
    (TRAINS, "--patience", "early-stopping early-stop early-stopping-patience es-patience patience-epochs"),
    (TRAINS, "--freeze", "freeze-backbone freeze-layers frozen freeze-epochs freeze-stages freeze-base unfreeze"),
    (TRAINS, "--sync-batchnorm", "sync-bn syncbn dist-bn split-bn sync-batch-norm"),
    (TRAINS, "--seed", "random-seed manual-seed random-state"),
    (
        TRAINS,
        "--augment.size",
        "img-size imgsz image-size input-size size resolution train-crop-size val-crop-size crop-size img-dim im-size"
        " input-shape target-size image-shape",
    ),
    (TRAINS, "--augment.resize", "val-resize-size resize-size crop-pct test-crop-pct"),
    (
        TRAINS,
        "--augment.crop",
        "rrc crop-fraction train-crop-mode random-resized-crop random-crop crop-scale scale-range",
    ),
    (TRAINS, "--augment.scale", "zoom max-zoom zoom-range random-zoom"),
    (TRAINS, "--augment.crop-ratio", "ratio"),
    (TRAINS, "--augment.flip", "hflip fliplr horizontal-flip flip-prob random-flip do-flip mirror no-hflip p-flip"),
    (TRAINS, "--augment.flip-vertical", "vflip flipud vertical-flip flip-vert"),
    (TRAINS, "--augment.rotate", "degrees rotation rotation-range max-rotate random-rotation rot"),
    (TRAINS, "--augment.brightness", "color-jitter jitter hsv-v brightness-range max-lighting colorjitter color"),
    (TRAINS, "--augment.saturation", "hsv-s"),
    (TRAINS, "--augment.hue", "hsv-h"),
    (TRAINS, "--augment.jitter-probability", "color-jitter-prob p-lighting"),
    (TRAINS, "--augment.affine-probability", "p-affine"),
    (TRAINS, "--augment.grayscale", "grayscale-prob gray color-mode"),
    (TRAINS, "--augment.translate", "width-shift-range height-shift-range shift shift-range"),
    (TRAINS, "--augment.shear", "shear-range max-warp"),
    (TRAINS, "--augment.fill", "fill-mode"),
    (TRAINS, "--augment.mean", "featurewise-center normalize rescale norm-mean"),
    (TRAINS, "--augment.std", "featurewise-std-normalization norm-std"),
    (TRAINS, "--sizes", "multi-scale progressive-resize progressive-resizing"),
    (TRAINS, "--momentum", "adam-beta1 beta1 opt-betas moms warmup-momentum betas"),
    (TRAINS, "--augment.erase", "reprob random-erase random-erasing erasing cutout re-prob"),
    (TRAINS, "--augment.mixup", "mixup-alpha mixup-prob mixup-mode mixup-switch-prob mixup-off-epoch"),
    (TRAINS, "--augment.cutmix", "cutmix-alpha cutmix-prob cutmix-minmax"),
    (
        TRAINS,
        "there is no policy of that kind; --augment.rotate, --augment.brightness and the other --augment flags stand for it",
        "aa auto-augment autoaugment randaugment rand-augment trivial-augment augmix ra-magnitude aug-splits augmix-severity"
        " mosaic copy-paste perspective gaussian-blur-prob blur bgr zca-whitening channel-shift-range"
        " close-mosaic scale-jitter",
    ),
    (
        TRAINS,
        "weights are pretrained by default; --weights None starts from random ones, --weights FILE from a file",
        "pretrained no-pretrained use-pretrained pre-trained pretrain from-scratch imagenet",
    ),
    (
        TRAINS,
        "--weights",
        "initial-checkpoint init-weights finetune-from pretrained-weights weight pretrained-path load-from"
        " ckpt checkpoint weights-path model-path",
    ),
    (TRAINS, "--recipe", "cfg config preset c config-file yaml config-path"),
    (
        ("train",),
        "--out",
        "output output-dir save-dir o outdir out-dir name project experiment save-path log-dir logdir logging-dir"
        " exp run-name default-root-dir checkpoint-dir ckpt-dir model-dir work-dir save results-dir save-folder out-path",
    ),
    (
        ("train",),
        "--save-steps",
        "save-freq checkpoint-freq save-period save-interval recovery-interval every-n-train-steps",
    ),
    (
        ("train",),
        "--resume",
        "continue resume-from resume-from-checkpoint restart ckpt-path start-epoch auto-resume initial-epoch last-epoch",
    ),
    (("train",), "--fold", "k-fold kfold cv"),
    (
        ("train",),
        "train always validates; to score a checkpoint, type fastflower evaluate CHECKPOINT {places}",
        "evaluate eval test test-only validate only-test val evaluate-only do-eval",
    ),
    (("preview",), "--out", "output o save-path output-dir save outfile"),
    (("preview",), "--images", "n num-images count num n-images"),
    (("doctor",), "--seconds", "time duration timeout"),
    (
        TRAINS,
        "pack divides the images: fastflower pack FOLDER --val-fraction 0.2",
        "val-split train-val-split val-pct valid-pct test-split validation-split val-fraction val-size"
        " val-ratio train-split valid-split"
        " split-ratio val-percent valid-size validation-fraction test-fraction",
    ),
    (
        _TAKE_SHARDS,
        "the shards come without a flag: fastflower {command} {places}",
        "validation-dir val-dir test-dir valid-dir validation-data data-folder folder dataset-name image-dir"
        " d data data-dir data-path dataset dataset-dir root shards train-dir input data-root train-data path dataset-path i",
    ),
    (
        TRAINS,
        "the classes are those of the shards",
        "num-classes n-classes nc classes nb-classes class-names num-labels n-class",
    ),
    (
        ("train", "doctor", "evaluate", "predict"),
        "--device cuda",
        "gpu gpus gpu-id gpu-ids cuda use-cuda use-gpu accelerator devices device-id ngpus num-gpus ngpu n-gpu n-gpus"
        " num-devices visible-devices",
    ),
    (
        ("train", "doctor", "evaluate", "predict"),
        "--device cpu",
        "cpu no-cuda no-gpu use-cpu disable-cuda",
    ),
    (
        (*TRAINS, "evaluate", "predict"),
        _THREADS,
        "j workers num-workers nworkers n-workers threads num-threads nthreads n-cpu cores",
    ),
    (
        ("train",),
        TORCHRUN,
        "local-rank world-size dist-url dist-backend multiprocessing-distributed distributed nodes num-nodes"
        " strategy rank ddp nproc nproc-per-gpu"
        " nproc-per-node nnodes node-rank master-addr master-port ddp-backend deepspeed fsdp dp data-parallel num-processes"
        " multi-gpu horovod no-ddp-bb gp find-unused-parameters rdzv-endpoint use-ddp parallel num-machines",
    ),
    (
        TRAINS,
        "--epochs sets the length of training, and each epoch has all training images; for a quick try, type --epochs 1",
        "max-steps steps-per-epoch limit-train-batches limit-val-batches fast-dev-run overfit-batches fraction min-epochs"
        " train-num-samples val-num-samples max-train-samples max-eval-samples max-iters iterations"
        " num-iters validation-steps"
        " epoch-repeats epoch-size steps total-iters max-iter num-steps min-steps limit-test-batches",
    ),
    (
        TRAINS,
        "training has no time limit; Ctrl-C saves it, and --resume continues",
        "time max-time max-train-time",
    ),
    (
        TRAINS,
        "a schedule has --lr, --warmup-epochs, --step-epochs and --gamma and no more; fastflower {command} --help schedule "
        "describes each",
        "min-lr lr-min lrf warmup-lr warmup-bias-lr lr-warmup-decay lr-warmup-method warmup-prefix cooldown-epochs lr-noise"
        " lr-noise-pct lr-noise-std lr-cycle-mul lr-cycle-decay lr-cycle-limit lr-k-decay sched-on-updates"
        " lr-power div pct-start"
        " div-final lr-base-size lr-base-scale eta-min t-max eta-max final-lr scale-lr auto-scale-lr lr-scheduler-kwargs",
    ),
    (
        TRAINS,
        "the optimizer has torch's defaults besides --lr, --momentum and --weight-decay",
        "opt-eps opt-kwargs adam-beta2 adam-epsilon beta2 eps epsilon nesterov amsgrad"
        " norm-weight-decay wd-bn-bias"
        " bias-weight-decay transformer-embedding-decay filter-bias-and-bn clip-mode gradient-clip-algorithm"
        " dampening alpha rho",
    ),
    (
        TRAINS,
        "no learning rate or batch size is searched for; set --lr and --batch-size",
        "auto-lr-find auto-scale-batch-size auto-find-batch-size find-lr lr-find autobatch",
    ),
    (
        TRAINS,
        "validation has no batch size of its own; --batch-size is that of training",
        "validation-batch-size vb val-batch-size per-device-eval-batch-size eval-batch-size test-batch-size valid-batch-size",
    ),
    (
        TRAINS,
        "the loss is cross-entropy, with --label-smoothing",
        "loss criterion loss-func loss-fn jsd-loss bce-loss bce-sum bce-target-thresh bce-pos-weight focal-loss bce cls"
        " sample-weight",
    ),
    (
        TRAINS,
        "the backbone stays as torchvision or timm define it; --weight-decay, --augment.erase and"
        " --augment.mixup also regularize",
        "dropout drop drop-rate drop-block dropout-rate bn-momentum bn-eps head-init-scale head-init-bias model-kwargs"
        " fast-norm hidden-dim num-layers depth dense-units bn-tf",
    ),
    (
        TRAINS,
        "images are RGB, and interpolation is bilinear",
        "in-chans in-channels channels input-img-mode interpolation train-interpolation antialias"
        " input-channels num-channels",
    ),
    (
        TRAINS,
        "each sample appears once in an epoch, with one draw",
        "aug-repeats ra-sampler ra-reps repeated-aug shuffle no-shuffle remode recount resplit worker-seeding shuffle-buffer"
        " group-by-length",
    ),
    (
        TRAINS,
        "it is done without a flag, or makes no difference here; leave it out",
        "pin-mem pin-memory no-pin-mem persistent-workers prefetch-factor prefetch no-prefetcher prefetcher"
        " use-multi-epochs-loader"
        " channels-last channels-last-memory-format cache cache-dataset cache-images cache-dir drop-last"
        " dataloader-drop-last benchmark"
        " cudnn-benchmark deterministic use-deterministic-algorithms fuser use-v2 data-backend synchronize-step"
        " dataloader-pin-memory dataset-download download do-train train remove-unused-columns"
        " ignore-mismatched-sizes single-cls"
        " rect save-images push-to-hub max-queue-size use-multiprocessing tracker overwrite detect-anomaly"
        " reload-dataloaders-every-n-epochs num-sanity-val-steps inference-mode barebones plugins"
        " device-modules dataset-trust-remote-code trust-remote-code"
        " is-train no-resume-opt metrics full-determinism use-mps-device backend",
    ),
    (TRAINS, "--checkpointing", "grad-checkpointing gradient-checkpointing activation-checkpointing"),
    (TRAINS, "--drop-path", "drop-path-rate stochastic-depth drop-connect stochastic-depth-prob"),
    (TRAINS, "--layer-decay", "layer-lr-decay llrd lr-layer-decay layerwise-decay"),
    (TRAINS, "--head-lr", "lr-head classifier-lr lr-classifier"),
    (
        ("train",),
        "history.csv, run.json and report.html in the folder of the run have every epoch",
        "print-freq log-interval log-freq verbose v quiet q wandb log-wandb wandb-project wandb-tags"
        " wandb-resume-id use-wandb"
        " tensorboard tb report-to logger logging-steps logging-strategy log-every-n-steps plots enable-progress-bar"
        " enable-model-summary csv-log disable-tqdm log-level logging-first-step progress-bar-refresh-rate save-json show",
    ),
    (
        ("train",),
        "checkpoint-best.pt and checkpoint-last.pt are always in the folder of the run",
        "checkpoint-hist save-total-limit save-strategy load-best-model-at-end enable-checkpointing save-best save-model"
        " save-best-only save-top-k save-last save-only-model callbacks cbs monitor",
    ),
    (
        ("train",),
        "the best epoch is the one of the highest validation accuracy; report.html has the other metrics",
        "eval-metric metric-for-best-model metric greater-is-better",
    ),
    (
        ("train",),
        "every epoch is validated",
        "evaluation-strategy eval-strategy eval-steps eval-freq eval-interval val-check-interval"
        " check-val-every-n-epoch noval"
        " validation-freq val-freq val-interval no-val do-predict do-test eval-every",
    ),
    (
        ("train",),
        "a run is never overwritten; pass another --out, or --resume",
        "exist-ok overwrite-output-dir force overwrite-output",
    ),
    (
        ("train",),
        "there is no distillation",
        "kd-model-name teacher teacher-model distillation-type distill teacher-path kd-loss-type kd-alpha",
    ),
    (
        ("train",),
        "fastflower doctor {places} measures the speed",
        "profile profiler benchmark-only",
    ),
    (
        ("train",),
        "it is for detection or segmentation; leave it out",
        "iou conf max-det box dfl pose kobj overlap-mask mask-ratio nms dnn anchors evolve",
    ),
    (TRAINS, "--augment.crop None --augment.flip 0", "no-aug no-augment no-augmentation"),
    (
        TRAINS,
        "each augmentation has a flag of its own, for example --augment.flip 0.5",
        "augment augmentation augmentations aug transforms transform item-tfms batch-tfms data-augmentation use-augmentation"
        " augs",
    ),
    (
        TRAINS,
        "pack reads labels: fastflower pack FOLDER --labels FILE --path-column NAME --label-column NAME --out shards",
        "class-map image-column-name label-column-name image-column input-key target-key label-col fn-col"
        " x-col y-col class-mode"
        " dataset-config-name",
    ),
    (("evaluate",), "--tta", "test-time-augmentation augment ttas"),
    (("predict",), "--tta", "test-time-augmentation ttas"),
    (("evaluate",), "--split", "subset mode set val train test dataset-split task"),
    (("evaluate", "predict"), "the batch size does not change the result and cannot be set", "b bs batch batch-size"),
    (
        ("evaluate", "predict"),
        "the checkpoint comes without a flag: fastflower {command} {places}",
        "checkpoint ckpt weights model resume model-path c m w ckpt-path weight load arch backbone model-weights model-file",
    ),
    (
        ("predict",),
        "the images come without a flag: fastflower {command} {places}",
        "source image images input data data-dir img i path file folder img-path image-path input-dir dir input-path img-dir",
    ),
    (("predict",), "--out", "output o save save-txt csv output-dir save-dir results-file results outfile out-file"),
    (
        ("predict",),
        "the probabilities of all classes are written by --out FILE.csv",
        "topk top-k k conf threshold probs save-conf include-probs top5 prob",
    ),
    (
        ("pack",),
        "--val-fraction",
        "val-split valid-pct validation-split val-size val-ratio val valid-split split-ratio valid-size",
    ),
    (("pack",), "--val-fraction", "train-ratio train-size train-fraction val-percent ratio train-split"),
    (("pack",), "--test-fraction", "test-size test-split test-ratio test"),
    (("pack",), "--max-side", "size img-size resize image-size imgsz max-size max-resolution max-dim"),
    (("pack",), "--quality", "jpeg-quality q jpg-quality"),
    (("pack",), "--shard-bytes", "shard-size maxsize maxcount shard-mb max-shard-size"),
    (("pack",), "--workers", "j num-workers threads nworkers n-workers processes num-threads jobs n-jobs num-proc"),
    (("pack",), "--out", "output o output-dir out-dir dest dst save-dir output-folder shards target"),
    (("pack",), "--folds", "k kfold k-folds n-splits n-folds num-folds cv"),
    (("pack",), "--labels", "csv annotations label ann-file labels-csv metadata annotation train-csv ann"),
    (("pack",), "--ignore", "exclude skip excludes filter"),
    (("pack",), "--seed", "random-seed random-state"),
    (("pack",), "--split-by", "stratify stratified group"),
    (
        ("pack",),
        "the folder comes without a flag: fastflower pack {places}",
        "data data-dir input folder d root dataset data-path src source i input-dir path images dataset-dir",
    ),
    (
        (*TRAINS, "evaluate"),
        "it is a flag of pack: pack first (fastflower pack FOLDER {flag} ... --out shards), then pass shards",
        "labels ignore folds split-by path-column label-column split-column max-side on-bad on-conflict drop-empty-classes"
        " as-split",
    ),
    (("verify",), "--repair", "fix rebuild"),
)
"""(commands, what to type instead, the words that mean it). The first line with a word counts."""

COMMAND_MEANINGS = {
    "pack": "convert prepare create build make split import shard prep dataset",
    "verify": "check validate-data checksum integrity fsck repair fix",
    "doctor": "diagnose profile benchmark bench bottleneck speed",
    "preview": "show view visualize augment plot display",
    "train": "fit finetune fine-tune run learn training fit-one-cycle tune",
    "evaluate": "eval test val validate score metrics validation evaluation",
    "predict": "infer inference classify detect prediction label predictions",
    "--help": "help usage commands",
    "--version": "version -V -v",
}
"""By command: the words that mean it."""
