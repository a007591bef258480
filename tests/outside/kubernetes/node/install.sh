#!/usr/bin/env bash
# Installs the chart of this checkout as release ratchet in namespace ml, after node.sh and stores.sh, and tests it. It
# is installed by ann, who is the administrator of that namespace alone.
. "$(dirname "$0")/common.sh"
checkout
in_ns=(--namespace "$ns")

filled namespace.yaml | kubectl apply --filename -
kubectl "${in_ns[@]}" create rolebinding ann --clusterrole admin --user ann
for role in rayservice-editor-role raycluster-editor-role raycluster-viewer-role; do
  kubectl "${in_ns[@]}" create rolebinding ann-$role --clusterrole $role --user ann
done
secret() { kubectl "${in_ns[@]}" create secret generic "$@"; }
secret ratchet-ledger --from-literal url=postgresql://ratchet:ratchet@$address:5499/ratchet
secret ratchet-operator --from-literal key="$(openssl rand -base64 32)"
secret ratchet-s3 --from-literal access-key-id=any --from-literal secret-access-key=any

filled values.yaml > "$run/values.yaml"
as_ann=("${in_ns[@]}" --kube-as-user ann --kube-as-group system:authenticated)
helm install ratchet "$source/helm/ratchet" "${as_ann[@]}" --values "$run/values.yaml" --timeout 15m
kubectl "${in_ns[@]}" wait rayservice/ratchet --for jsonpath='{.status.serviceStatus}'=Running --timeout 15m
helm test ratchet "${as_ann[@]}" --logs --timeout 15m

filled client.yaml | kubectl apply --filename -
kubectl "${in_ns[@]}" wait pod/client --for condition=Ready --timeout 1m
