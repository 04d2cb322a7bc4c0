# shellcheck shell=bash disable=SC2154  # sourced by launch_tpu.sh: variables cross files
# The same run on GKE, by Google's xpk: for TPU7x, which the Cloud TPU API does not serve. Printed, never run.

print_xpk() {
  local where=(--zone="$zone") tree=/tmp/dpo_jax-${sha:0:12} flag reservation='' secrets=()
  local capacity_flag=--$capacity names=() variable
  [[ ! $project ]] || where+=(--project="$project")
  for flag in "${create_flags[@]}"; do
    [[ $flag != --reservation=* ]] || reservation=$flag
  done
  if [[ $capacity == reserved ]]; then
    [[ $reservation ]] || die 2 "--reserved with --backend=xpk needs --create-flag=--reservation=NAME"
    capacity_flag=$reservation
  fi
  for variable in HF_TOKEN WANDB_API_KEY "${pass_env[@]}"; do
    [[ ! ${!variable+set} ]] || names+=("$variable")
  done

  echo "# $type on GKE: \`pip install xpk\` and docker on this machine, then these commands one after the other."
  echo "# 1. the committed tree: what is in it becomes the image"
  shown mkdir -p "$tree"
  echo "$(shown git -C "$here" archive "$sha") | $(shown tar -x -C "$tree")"
  if [[ $env_file ]]; then
    secrets=(--env-file="$env_file")
  elif ((${#names[@]})); then # xpk takes the values of bare names from this environment
    secrets=(--env-file="$tree.env")
    echo "$(shown printf '%s\n' "${names[@]}") >$tree.env"
  fi
  echo "# 2. a cluster with the slice; it is billed until it is deleted"
  shown xpk cluster create --cluster="$name" "${where[@]}" --tpu-type="$type" --num-slices=1 "$capacity_flag"
  echo "# 3. the run; lost pods come again and resume (exit codes above 126), a crash or bad input does not"
  shown xpk workload create --workload="$name" --cluster="$name" "${where[@]}" --tpu-type="$type" --num-slices=1 \
    --base-docker-image=python:3.12 --script-dir="$tree" --max-restarts="$max_retries" \
    --termination-grace-period-seconds="$grace" "${secrets[@]}" --command="$(gke_command)"
  echo "# 4. what runs, and at the end what is billed no longer"
  shown xpk workload list --cluster="$name" "${where[@]}"
  shown xpk cluster delete --cluster="$name" "${where[@]}"
}

gke_command() { # exec, as xpk hands SIGTERM to this shell alone
  printf "pip install -q '.[tpu,gcs]' && exec python -m dpo_jax.train%s" \
    "$(printf ' %q' "--config=$config" "--workdir=$workdir" --distributed "${train_args[@]}")"
}
