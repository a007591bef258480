{{/* Names and labels. KubeRay appends up to 13 characters to names, and takes 47 at most, of a DNS label. */}}
{{- define "ratchet.fullname" -}}
{{- $name := include "ratchet.wantedName" . -}}
{{- if not (regexMatch "^[a-z][-a-z0-9]*$" $name) -}}
{{- fail (printf "%s cannot be the name of a RayService: it must be small letters, digits and -, a letter first. Set fullnameOverride." $name) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{- define "ratchet.wantedName" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 40 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "ratchet.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: ratchet
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* What selects the pods of one part: (list $ "ingest"). KubeRay needs app.kubernetes.io/name for itself. */}}
{{- define "ratchet.selector" -}}
{{- $top := index . 0 -}}
app.kubernetes.io/instance: {{ $top.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Of the containers of a part: (list $ "ingest"). Those without a model have the slim image. */}}
{{- define "ratchet.image" -}}
{{- $top := index . 0 -}}
{{- $slim := has (index . 1) (list "ingest" "maintain" "console" "migration" "test") -}}
{{- with $top.Values.image -}}
{{- if not (regexMatch "^([^/]*[.:][^/]*|localhost)/" .repository) -}}
{{- fail (printf "image.repository is %q, which names no registry, so nodes would pull it from Docker Hub. Name yours, as in registry.example/ratchet; Docker Hub's is docker.io/OWNER/ratchet." .repository) -}}
{{- end -}}
{{- $tag := default (printf "%s-%s" $top.Chart.AppVersion ($slim | ternary "slim" .flavour)) .tag -}}
{{- printf "%s:%s" .repository ($slim | ternary (default $tag .slimTag) $tag) -}}
{{- end -}}
{{- end -}}

{{- define "ratchet.server" -}}
{{- printf "%s-serve-svc" (include "ratchet.fullname" .) -}}
{{- end -}}

{{/* Serving goes before training when a node is full: (list $ "serving"). Priority classes belong to no namespace, so
     their names say which. */}}
{{- define "ratchet.priorityClass" -}}
{{- $top := index . 0 -}}{{- $which := index . 1 -}}
{{- $named := index $top.Values.priorityClasses $which -}}
{{- if $named -}}{{ $named }}{{- else if $top.Values.priorityClasses.create -}}
{{ include "ratchet.fullname" $top }}-{{ $top.Release.Namespace }}-{{ $which }}{{- end -}}
{{- end -}}
