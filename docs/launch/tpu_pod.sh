#!/usr/bin/env bash
# Trains on TPU VMs: requests a pod, installs, starts every worker; after a preemption, once more.
#   ZONE=us-west4-a TYPE=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite \
#     docs/launch/tpu_pod.sh NAME configs/pods/v5e_256.toml gs://BUCKET/runs/7b
# Run it in the checkout, in a terminal that stays (tmux). Delete the pod when it has ended:
#   gcloud compute tpus queued-resources delete NAME --zone ZONE --force
set -euo pipefail
name=$1 config=$2 run_dir=$3
: "${ZONE:?}" "${TYPE:?}" "${RUNTIME:?}"
poll_seconds=${POLL_SECONDS:-60}

queued() { gcloud compute tpus queued-resources "$1" "$name" --zone "$ZONE" "${@:2}"; }
on_workers() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$ZONE" --worker all --command "$1"
}

install() {
  git archive --format tar.gz --prefix megalodon/ --output "/tmp/$name.tar.gz" HEAD
  gcloud compute tpus tpu-vm scp "/tmp/$name.tar.gz" "$name:source.tar.gz" --zone "$ZONE" \
    --worker all
  on_workers 'tar -xzf source.tar.gz && if [ ! -x venv/bin/megalodon ]; then
    python3 -m pip install -q --user uv && python3 -m uv venv -q --python 3.12 venv &&
    python3 -m uv pip install -q --python venv "./megalodon[tpu,gcs]"; fi'
}

while true; do
  state=$(queued describe --format 'value(state.state)' || echo ABSENT)
  echo "$name: $state"
  case $state in
    ABSENT)
      queued create --node-id "$name" --accelerator-type "$TYPE" --runtime-version "$RUNTIME" --spot
      ;;
    ACTIVE)
      code=0
      install && on_workers "cd megalodon &&
        ~/venv/bin/megalodon train '$config' --run_dir '$run_dir' --auto_resume" || code=$?
      case $code in
        # Done, or a wrong configuration. Anything else: a preemption, a hang, a lost connection.
        0 | 2) exit "$code" ;;
      esac
      ;;
    FAILED | SUSPENDED)
      queued delete --force --quiet
      ;;
  esac
  sleep "$poll_seconds"
done
