"""Names of the files in a training run's folder, shared by training and the commands that read a run."""

METRICS_FILE = "metrics.jsonl"  # every log as one row
PROBES_FILE = "probes.jsonl"  # the probe set: prompts and answers
DYNAMICS_FILE = "dynamics.parquet"  # measures of the probe set over training; an analysis of checkpoints writes one too
BOUNDARY_FILE = "boundary.json"  # the layer that `internal_layer auto` chose
STATE_FILE = "bupo.pt"  # state of the run in a checkpoint, in addition to the Trainer's
FINISHED_FILE = "finished.json"  # written last; marks a finished run
