#!/usr/bin/env bash
# Prints the JobSet that trains a recipe on Kubernetes, for `kubectl apply -f -`.
set -euo pipefail

here="$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
script=kubernetes.sh
# shellcheck source=launch/lib_supervised.sh
source "$here/lib_supervised.sh"

usage() {
    cat << 'HELP'
usage: bash launch/kubernetes.sh --nodes N --gpus N --image IMAGE --claim CLAIM [OPTIONS] RECIPE [FLAGS of the recipe]

Prints launch/kubernetes.yaml, a JobSet, filled in. Needs the JobSet controller, and the Secret NAME-secret, by which the pods know
each other (launch/README.md, Trust).
  --apply             create the Secret, with a new random value, and the JobSet, instead of printing it
  --nodes N           pods, one a node
  --gpus N            GPUs, and ranks, in each pod; 0: pods without GPUs, with --processes ranks
  --processes N       ranks in each pod (default: --gpus)
  --image IMAGE       a container image with everything in requirements.txt
  --claim CLAIM       a PersistentVolumeClaim that all pods may write, mounted at /shared
  --repository DIR    the repository inside the pods (default: /shared/trifold); RECIPE is a path in it
  --name NAME         name of the JobSet (default: the recipe's file name)
HELP
    common_usage
    cat <<< "Here --restarts counts all restarts of the JobSet, not those in a row."
}

nodes="" gpus="" image="" claim="" repository=/shared/trifold name="" processes="" apply=""
own_flag() {
    case "$1" in
        --apply)
            apply=yes took=1
            return 0
            ;;
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

# Prints the template with a value for each @KEY@, as JSON writes it, which is YAML. The words of the pods follow the values.
fill_template() {
    python3 - "$here/kubernetes.yaml" "$@" << 'FILL'
import json, re, sys

path, name, nodes, slots, gpus, image, claim, repository, restarts, *words = sys.argv[1:]
if odd := [word for word in sys.argv[1:] if not word.isprintable()]:
    print(f"launch/kubernetes.sh: {odd[0]!a} holds a character that YAML cannot carry", file=sys.stderr)
    sys.exit(2)
values = {
    "NAME": name, "SECRET": name + "-secret", "IMAGE": image, "CLAIM": claim, "REPOSITORY": repository,
    "NODES": int(nodes), "NODES_TEXT": str(int(nodes)), "SLOTS_TEXT": str(int(slots)), "RESTARTS": int(restarts),
    "RESOURCES": {"nvidia.com/gpu": int(gpus)} if int(gpus) else {},
    "WORDS": [word.replace("$", "$$") for word in words],  # Kubernetes puts variables in the place of $(NAME) in arguments
}
text = open(path, encoding="utf-8").read().replace(" launch/kubernetes.sh fills in the @WORDS@.", "", 1)
sys.stdout.reconfigure(encoding="utf-8")
print(re.sub(r"@([A-Z_]+)@", lambda key: json.dumps(values[key[1]], ensure_ascii=False), text), end="")
FILL
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
command -v python3 > /dev/null || fail "needs python3, which writes the YAML"

text="$(fill_template "$name" "$nodes" "$slots" "$gpus" "$image" "$claim" "$repository" "$restarts" "${supervisor[@]}" "$recipe" "${recipe_flags[@]}")"
if [[ -z "$apply" || -n "$print" ]]; then
    printf '%s\n' "$text"
    exit 0
fi
# through pipes: the secret is on no command line and in no file
python3 -c 'import secrets; print(secrets.token_hex(32), end="")' \
    | kubectl create secret generic "$name-secret" --from-file=secret=/dev/stdin --dry-run=client --output=json \
    | kubectl apply --filename -
kubectl apply --filename - <<< "$text"
