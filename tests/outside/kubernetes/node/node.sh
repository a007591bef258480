#!/usr/bin/env bash
# Makes the node one that runs pods, after start.sh and image.sh: containerd, kubelet, kube-proxy and kube-router (for
# NetworkPolicies); then KubeRay's operator and DNS as pods.
. "$(dirname "$0")/common.sh"
checkout
mkdir -p "$run/cni"

cat > "$run/cni/pods.conflist" <<Y
{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isDefaultGateway": true, "ipMasq": true, "hairpinMode": true,
   "ipam": {"type": "host-local", "ranges": [[{"subnet": "$pods"}]]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
Y
# Without restrict_oom_score_adj and CAP_SYS_RESOURCE, runc fails with "can't get final child's PID".
cat > "$run/containerd.toml" <<Y
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = "docker.io/local/pause:1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$run/cni"
[plugins."io.containerd.internal.v1.opt"]
  path = "/var/lib/containerd/opt"
Y
cat > "$run/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: $address
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $run/pki/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $run/pki/node.crt
tlsPrivateKeyFile: $run/pki/node.key
cgroupDriver: cgroupfs
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
volumePluginDir: /var/lib/kubelet/volume-plugins
clusterDNS: [$dns_service]
clusterDomain: cluster.local
resolvConf: $run/resolv.conf
failSwapOn: false
evictionHard: {memory.available: 100Mi, nodefs.available: 1%, imagefs.available: 1%}
imageGCHighThresholdPercent: 100
Y
touch "$run/resolv.conf"
cat > "$run/proxy.yaml" <<Y
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: iptables
clientConnection: {kubeconfig: $run/proxy.conf}
clusterCIDR: $pods
conntrack: {maxPerCore: 0}
Y

start containerd containerd --config "$run/containerd.toml"
await inside ctr version
for image in pause kuberay ratchet; do inside ctr --namespace k8s.io images import "$img/$image.tar"; done
inside ctr --namespace k8s.io images tag docker.io/local/ratchet:1 docker.io/local/ratchet:next # to upgrade to
start kubelet kubelet --config "$run/kubelet.yaml" --kubeconfig "$run/node.conf" --node-ip $address
start kube-proxy kube-proxy --config "$run/proxy.yaml"
await kubectl get node node
kubectl patch node node --patch "{\"spec\": {\"podCIDR\": \"$pods\", \"podCIDRs\": [\"$pods\"]}}"
start kube-router kube-router --kubeconfig "$run/admin.conf" --service-cluster-ip-range $services \
  --run-firewall=true --run-router=false --run-service-proxy=false --metrics-port 0

kubectl apply --server-side --filename "$dir/crds"
kubectl --namespace kube-system create configmap dns --from-file "$here/dns.py" --dry-run=client --output yaml |
  kubectl apply --filename -
filled system.yaml | kubectl apply --filename -
kubectl wait node/node --for condition=Ready --timeout 60s
kubectl --namespace kube-system rollout status deployment/kube-dns --timeout 2m
kubectl --namespace kuberay rollout status deployment/kuberay-operator --timeout 2m
