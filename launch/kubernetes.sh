#!/usr/bin/env bash
# Prints the JobSet that trains a recipe on Kubernetes, for `kubectl apply -f -`.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
script=kubernetes.sh
# shellcheck source=launch/lib_supervised.sh
source "$here/lib_supervised.sh"

usage() {
    cat << 'HELP'
usage: bash launch/kubernetes.sh --nodes N --gpus N --image IMAGE --claim CLAIM [OPTIONS] RECIPE [FLAGS of the recipe] | kubectl apply -f -

Prints launch/kubernetes.yaml, a JobSet, filled in. It only prints, with or without --print. Needs the JobSet controller.
  --nodes N           pods, one a node
  --gpus N            GPUs, and ranks, in each pod; 0: pods without GPUs, with --processes ranks
  --processes N       ranks in each pod (default: --gpus)
  --image IMAGE       a container image with everything in requirements.txt
  --claim CLAIM       a PersistentVolumeClaim that all pods may write, mounted at /shared
  --repository DIR    the repository inside the pods (default: /shared/trifold); RECIPE is a path in it
  --name NAME         name of the JobSet (default: the recipe's file name)
HELP
    common_usage
    echo "Here --restarts counts all restarts of the JobSet, not those in a row."
}

nodes="" gpus="" image="" claim="" repository=/shared/trifold name="" processes=""
own_flag() {
    case "$1" in
        --nodes | --gpus | --processes)
            [[ "${2:-}" =~ ^[0-9]+$ ]] || fail "$1 needs a number, got '${2:-}'"
            printf -v "${1#--}" '%s' "$2"
            ;;
        --image | --claim | --repository | --name)
            [[ "${2:-}" =~ ^[A-Za-z0-9@:./_-]+$ ]] || fail "$1 needs a name or a path without blanks, got '${2:-}'"
            printf -v "${1#--}" '%s' "$2"
            ;;
        --restarts)
            [[ "${2:-}" =~ ^[0-9]+$ ]] || fail "--restarts needs a number, got '${2:-}'"
            restarts="$2"
            ;;
        *) return 0 ;;
    esac
    took=2
}

# Prints the words as a JSON list, which is also YAML.
json_list() {
    local word line=""
    for word in "$@"; do
        word="${word//\\/\\\\}"
        line+="${line:+, }\"${word//\"/\\\"}\""
    done
    printf '[%s]' "$line"
}

restarts=20
cd "$(dirname "$here")" # RECIPE is a path in the repository
take_words "$@"
for needed in nodes gpus image claim; do
    [[ -n "${!needed}" ]] || fail "--$needed is needed"
done
((nodes > 0)) || fail "--nodes needs a number over 0, got '$nodes'"
slots="${processes:-$gpus}"
((slots > 0)) || fail "--gpus 0 needs --processes"
if [[ -z "$name" ]]; then
    name="$(basename "$recipe" .py)"
    name="${name//_/-}" # a DNS name
fi
[[ "$name" =~ ^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$ ]] || fail "--name $name must be a DNS name: lower case letters, digits, -"
resources="{}"
((gpus == 0)) || resources="{nvidia.com/gpu: $gpus}"

text="$(< "$here/kubernetes.yaml")"
text="$(sed '1s/ launch\/kubernetes.sh fills.*$//' <<< "$text")"
declare -A values=(
    [NAME]="$name" [NODES]="$nodes" [SLOTS]="$slots" [IMAGE]="$image" [CLAIM]="$claim" [REPOSITORY]="$repository"
    [SECRET]="$name-secret" [RESTARTS]="$restarts" [RESOURCES]="$resources" [WORDS]="$(json_list "${supervisor[@]}" "$recipe" "${recipe_flags[@]}")"
)
for key in "${!values[@]}"; do
    text="${text//"@$key@"/"${values[$key]}"}"
done
printf '%s\n' "$text"
