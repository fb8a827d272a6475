#!/usr/bin/env bash
#SBATCH --job-name=layerboost
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --gpus-per-node=1
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=layerboost-%j.log
# This starts a Ray cluster inside an allocation and one run on it: sbatch clusters/slurm.sh RECIPE OUT [options of run]
# Submit it in the project's folder with its environment activated. The project, the environment, the home folder and
# OUT must be on a shared file system.
set -euo pipefail
recipe=${1:?a recipe} out=${2:?a run folder that every node reaches}
shift 2

export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
# These variables make Ray notice within 40 seconds that a machine does not respond any more.
export RAY_health_check_period_ms=1000 RAY_health_check_timeout_ms=5000 RAY_health_check_failure_threshold=6
ray get-auth-token --generate >/dev/null # writes ~/.ray/auth_token, which all nodes read
chmod 600 ~/.ray/auth_token

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on() { # usage: on NODE COMMAND...; it runs in a subshell, where exec lets signals reach srun
  exec srun --nodes=1 --ntasks=1 --overlap --nodelist="$1" "${@:2}"
}
# The folder must be our own, since /tmp/ray may belong to another user.
common=(--block --temp-dir="/tmp/ray-$SLURM_JOB_ID" --num-cpus="$SLURM_CPUS_ON_NODE"
  --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --labels="layerboost/hardware=${LAYERBOOST_HARDWARE:-small}")
# Each job has its own port, because a job that has just ended on these nodes can still hold Ray's default port.
port=$((20000 + SLURM_JOB_ID % 10000))
head_ip=$(on "${nodes[0]}" python -c 'import ray; print(ray.util.get_node_ip_address())')

trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT
on "${nodes[0]}" ray start --head --node-ip-address="$head_ip" --port="$port" --dashboard-host=127.0.0.1 \
  "${common[@]}" &
until ray health-check --address "$head_ip:$port" 2>/dev/null; do
  kill -0 $! # fails if the head has ended, which ends this script
  sleep 1
done
for node in "${nodes[@]:1}"; do
  on "$node" ray start --address="$head_ip:$port" "${common[@]}" &
done
python clusters/wait_for.py nodes "${#nodes[@]}" --address "$head_ip:$port" --timeout-s 600

python -m orchestrator run "$recipe" --out "$out" --address "$head_ip:$port" "$@"
