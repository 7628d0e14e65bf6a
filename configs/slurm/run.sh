#!/bin/bash
# All stages of a run as a chain of jobs; the levels' priors train at the same time. Prints the ids of the jobs.
#   configs/slurm/run.sh my.yaml [--section.key value ...]
#   LEVELS=2 configs/slurm/run.sh my.yaml    where the tokenizer comes from elsewhere
# What all jobs need is said by sbatch's own variables, as SBATCH_PARTITION and SBATCH_ACCOUNT; what one stage needs by
# its script. After a failure mend the cause and run this again: what is complete is skipped.
set -euo pipefail
here=$(dirname "$(realpath "$0")")

# Each level is a job, submitted before there are codes that would say how many.
levels=${LEVELS:-$(python -c '
import sys
from pipelines.config import load_config

config = load_config(sys.argv[1], sys.argv[2:])
if config.tokenizer.from_ or config.codes.from_:
    sys.exit("the tokenizer comes from elsewhere: say how many levels it has, as LEVELS=2 configs/slurm/run.sh ...")
print(config.tokenizer.model.num_levels)
' "$@")}

# submit STAGE DEPENDENCY ARGUMENT...: prints the id of the job, which is cancelled if what it waits for fails.
submit() {
  sbatch --parsable ${2:+"--dependency=$2"} --kill-on-invalid-dep=yes "$here/$1.sbatch" "${@:3}" | cut -d ';' -f 1
}

pack=$(submit pack "" "$@")
tokenizer=$(submit train-tokenizer "afterok:$pack" "$@")
codes=$(submit encode "afterok:$tokenizer" "$@")
priors=""
for ((level = 0; level < levels; level++)); do
  priors+=":$(submit train-prior "afterok:$codes" "$@" --level "$level")"
done
samples=$(submit sample "afterok$priors" "$@")
figures=$(submit evaluate "afterok$priors" "$@")
echo "pack $pack, train-tokenizer $tokenizer, encode $codes, train-prior ${priors#:}, sample $samples, evaluate $figures"
