#!/usr/bin/env bash
# Builds Kubernetes, kube-router, Helm, KubeRay's operator and pause from Go's module proxy into bin/, and copies
# KubeRay's CustomResourceDefinitions and ClusterRoles into crds/. About 35 minutes on two cores, one with a warm Go cache.
. "$(dirname "$0")/common.sh"
minor=34 kubernetes=1.34.4  # a kubelet from 1.35 on refuses cgroup v1
kuberay=v1.6.2 helm=v3.22.0 router=v2.1.0
export CGO_ENABLED=0 GOFLAGS="-buildvcs=false -mod=mod" GOTOOLCHAIN=${GOTOOLCHAIN:-local} GOBIN=$bin
modules=$(go env GOMODCACHE)
mkdir -p "$bin" "$dir/crds" "$dir/build/kubernetes" "$dir/build/router"

build() { echo "$(date +%T) go $*"; nice go "$@"; }

# k8s.io/kubernetes replaces its dependencies by folders of its repository, which its module does not have.
cd "$dir/build/kubernetes"
go mod download "k8s.io/kubernetes@v$kubernetes"
{
  printf 'module local.test/build\n\ngo 1.24.0\n\ngodebug default=go1.24\n\n'
  printf 'require k8s.io/kubernetes v%s\n\nreplace (\n' $kubernetes
  sed -n "s,^[[:space:]]*\(k8s.io/[a-z0-9-]*\) => ./staging.*,\t\1 => \1 v0.${kubernetes#1.},p" \
    "$modules/k8s.io/kubernetes@v$kubernetes/go.mod"
  echo ')'
} > go.mod
version="-X k8s.io/client-go/pkg/version.gitVersion=v$kubernetes"
for value in gitVersion=v$kubernetes gitMajor=1 gitMinor="$minor" gitTreeState=clean; do
  version+=" -X k8s.io/component-base/version.$value"
done
for command in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubectl; do
  build build -ldflags "-s -w $version" -o "$bin/" k8s.io/kubernetes/cmd/$command
done

cd "$dir/build/router"
package=github.com/cloudnativelabs/kube-router/v2
printf 'module local.test/build\n\ngo 1.24.0\n\nrequire %s %s\n' $package $router > go.mod
build build -ldflags "-s -w" -o "$bin/" $package/cmd/kube-router

version="-X helm.sh/helm/v3/internal/version.version=$helm"
for value in k8sVersionMajor=1 k8sVersionMinor="$minor"; do version+=" -X helm.sh/helm/v3/pkg/chartutil.$value"; done
build install -ldflags "-s -w $version" helm.sh/helm/v3/cmd/helm@$helm
build install -ldflags "-s -w" github.com/ray-project/kuberay/ray-operator@$kuberay
operator=$modules/github.com/ray-project/kuberay/ray-operator@$kuberay
cp --no-preserve=mode "$operator"/config/crd/bases/*.yaml "$operator"/config/rbac/{role,*_editor_role,*_viewer_role}.yaml "$dir/crds/"

cd "$here/pause"
build build -ldflags "-s -w" -o "$bin/" .
