{{/* What all pods have in common. */}}
{{- define "ratchet.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end -}}

{{- define "ratchet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
privileged: false
capabilities: {drop: [ALL]}
{{- end -}}

{{/* Image and its secrets, placement and identity of a pod: (list $ "ingest" values), and true where it calls Kubernetes. */}}
{{- define "ratchet.podSpec" -}}
{{- $top := index . 0 -}}{{- $part := index . 1 -}}{{- $values := index . 2 -}}
serviceAccountName: {{ include "ratchet.fullname" $top }}
automountServiceAccountToken: {{ and (gt (len .) 3) (last .) | not | not }}
enableServiceLinks: false
{{- if and $values.gpus $top.Values.runtimeClassName }}
runtimeClassName: {{ $top.Values.runtimeClassName }}
{{- end }}
{{- with include "ratchet.priorityClass" (list $top (has $part (list "updater" "training-head" "training-worker") | ternary "training" "serving")) }}
priorityClassName: {{ . }}
{{- end }}
securityContext: {{- include "ratchet.podSecurity" $top | nindent 2 }}
{{- with $top.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- include "ratchet.placement" $values }}
topologySpreadConstraints:
  {{- range list "kubernetes.io/hostname" "topology.kubernetes.io/zone" }}
  - maxSkew: 1
    topologyKey: {{ . }}
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "ratchet.selector" (list $top $part) | nindent 8 }}
  {{- end }}
{{- end -}}

{{/* On which nodes a pod may run: its values. */}}
{{- define "ratchet.placement" -}}
{{- with .nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* What an installation adds to every pod: $. */}}
{{- define "ratchet.addedAnnotations" -}}
{{- with .Values.podAnnotations }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{/* Of a container: (list $), and the values that have its GPUs. Without GPUs NVIDIA's runtime is told to show none, since an
image can ask it for all. */}}
{{- define "ratchet.addedEnv" -}}
{{- $values := (index . 0).Values -}}
{{- if or (eq (len .) 1) (not (last .).gpus) }}
- {name: NVIDIA_VISIBLE_DEVICES, value: void}
{{- end }}
{{- if or $values.caBundle.configMap $values.caBundle.secret }}
{{- range list "SSL_CERT_FILE" "REQUESTS_CA_BUNDLE" "AWS_CA_BUNDLE" }}
- name: {{ . }}
  value: /etc/ratchet/ca/{{ $values.caBundle.key }}
{{- end }}
{{- end }}
{{- with $values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "ratchet.addedMounts" -}}
{{- if or .Values.caBundle.configMap .Values.caBundle.secret }}
- {name: ca, mountPath: /etc/ratchet/ca, readOnly: true}
{{- end }}
{{- with .Values.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "ratchet.addedVolumes" -}}
{{- with .Values.caBundle }}
{{- if .configMap }}
- name: ca
  configMap: {name: {{ .configMap }}, items: [{key: {{ .key }}, path: {{ .key }}}]}
{{- else if .secret }}
- name: ca
  secret: {secretName: {{ .secret }}, defaultMode: 0440, items: [{key: {{ .key }}, path: {{ .key }}}]}
{{- end }}
{{- end }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Of a part: (list $ "ingest"). */}}
{{- define "ratchet.container" -}}
image: {{ include "ratchet.image" . }}
imagePullPolicy: {{ (index . 0).Values.image.pullPolicy }}
securityContext: {{- include "ratchet.containerSecurity" . | nindent 2 }}
{{- end -}}

{{/* Stops an install whose pods would wait for a Secret, or a key of one, in silence. Where nothing can be asked (helm
template, a namespace that Helm makes), nothing is: every namespace has the service account `default`. */}}
{{- define "ratchet.secretsExist" -}}
{{- $namespace := .Release.Namespace -}}
{{- if lookup "v1" "ServiceAccount" $namespace "default" -}}
{{- $keys := list "key" "accessKeyIdKey" "secretAccessKeyKey" "clientKey" "passwordKey" "usernameKey" -}}
{{- $users := dict "ledger" .Values.ledger "operatorKey" .Values.operatorKey "objectStore" .Values.objectStore "kafka" .Values.kafka -}}
{{- if .Values.ingest.enabled }}{{ $_ := set $users "ingest.splitKey" .Values.ingest.splitKey }}{{ end -}}
{{- if .Values.console.enabled }}{{ $_ := set $users "console.oidc" .Values.console.oidc }}{{ end -}}
{{- if .Values.serving.gcsFaultTolerance.enabled }}{{ $_ := set $users "serving.gcsFaultTolerance" .Values.serving.gcsFaultTolerance }}{{ end -}}
{{- range $value, $user := $users -}}
{{- $wanted := $user.existingSecret -}}
{{- if $wanted.name -}}
{{- $secret := lookup "v1" "Secret" $namespace $wanted.name -}}
{{- if not $secret -}}
{{- fail (printf "namespace %s has no Secret %s, which %s.existingSecret names. Create it first." $namespace $wanted.name $value) -}}
{{- end -}}
{{- range $name := $keys -}}
{{- $key := get $wanted $name -}}
{{- if and $key (not (hasKey (default (dict) $secret.data) $key)) -}}
{{- fail (printf "Secret %s, which %s.existingSecret names, has no key %s." $wanted.name $value $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The ledger's URL alone: what the migration needs. */}}
{{- define "ratchet.ledgerEnv" -}}
- name: HOME
  value: /home/ratchet
- name: RATCHET_LEDGER_URL
  valueFrom:
    secretKeyRef: {name: {{ .Values.ledger.existingSecret.name }}, key: {{ .Values.ledger.existingSecret.key }}}
{{- end -}}

{{/* What may call the model server's every route. */}}
{{- define "ratchet.operatorKeyEnv" -}}
{{- with .Values.operatorKey.existingSecret -}}
- name: RATCHET_SERVE__OPERATOR_KEY
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end -}}
{{- end -}}

{{/* Settings file, the secrets that a part needs, and where the object store is: (list $ "ingest").
     Lance and s3fs read the same AWS variables. */}}
{{- define "ratchet.env" -}}
{{- $top := index . 0 -}}{{- $part := index . 1 -}}
- name: RATCHET_CONFIG
  value: /etc/ratchet/ratchet.yaml
{{ include "ratchet.ledgerEnv" $top }}
{{- if has $part (list "serving" "console" "updater") }}
{{ include "ratchet.operatorKeyEnv" $top }}
{{- end }}
{{- if has $part (list "ingest" "maintain" "console") }}
{{- with $top.Values.kafka.existingSecret }}
{{- if .name }}
- name: RATCHET_KAFKA__CLIENT
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .clientKey }}}
- name: RATCHET_KAFKA__OAUTH__CLIENT_SECRET
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .oauthClientSecretKey }}, optional: true}
{{- if ne $part "maintain" }}
- name: RATCHET_KAFKA__SCHEMA_REGISTRY_AUTH
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .schemaRegistryAuthKey }}, optional: true}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- if and (eq $part "updater") $top.Values.updater.workers.enabled (eq $top.Values.serving.rayAuth "token") }}
- {name: RAY_AUTH_MODE, value: token}
- name: RAY_AUTH_TOKEN # KubeRay makes the Secret with the cluster
  valueFrom:
    secretKeyRef: {name: {{ include "ratchet.fullname" $top }}-training, key: auth_token}
{{- end }}
{{- if eq $part "console" }}
{{- with $top.Values.console.oidc.existingSecret }}
{{- if .name }}
- name: RATCHET_CONSOLE__OIDC__CLIENT_SECRET
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end }}
{{- end }}
{{- end }}
{{- if eq $part "ingest" }}
{{- with $top.Values.ingest.splitKey.existingSecret }}
{{- if .name }}
- name: RATCHET_INGEST__SPLIT_KEY
  valueFrom:
    secretKeyRef: {name: {{ .name }}, key: {{ .key }}}
{{- end }}
{{- end }}
{{- end }}
{{ include "ratchet.storeEnv" $top }}
{{- end -}}

{{/* Where the object store is, for s3fs, Lance and Arrow: $. */}}
{{- define "ratchet.storeEnv" -}}
{{- with $.Values.objectStore }}
- name: AWS_REGION
  value: {{ .region | quote }}
- name: AWS_DEFAULT_REGION
  value: {{ .region | quote }}
{{- if .endpoint }}
- name: AWS_ENDPOINT_URL
  value: {{ .endpoint | quote }}
{{- if hasPrefix "http://" .endpoint }}
- name: AWS_ALLOW_HTTP
  value: "true"
{{- end }}
{{- end }}
{{- if .existingSecret.name }}
- name: AWS_ACCESS_KEY_ID
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret.name }}, key: {{ .existingSecret.accessKeyIdKey }}}
- name: AWS_SECRET_ACCESS_KEY
  valueFrom:
    secretKeyRef: {name: {{ .existingSecret.name }}, key: {{ .existingSecret.secretAccessKeyKey }}}
{{- end }}
{{- end }}
{{- end -}}

{{/* What a container may write to, on a root that it may not: caches, /tmp, and ratchet's home. */}}
{{- define "ratchet.mounts" -}}
{{- $top := index . 0 -}}{{- $part := index . 1 -}}
- {name: settings, mountPath: /etc/ratchet/ratchet.yaml, subPath: ratchet.yaml, readOnly: true}
- {name: user, mountPath: /home/ratchet}
- {name: tmp, mountPath: /tmp}
- {name: home, mountPath: /var/lib/ratchet}
{{- with $top.Values.kafka.existingSecret }}
{{- if and .name (has $part (list "ingest" "maintain" "console")) }}
- {name: kafka, mountPath: {{ .mountPath }}, readOnly: true}
{{- end }}
{{- end }}
{{- if and (eq $top.Values.bases.source "volume") (has $part (list "serving" "updater" "indexes")) }}
- {name: bases, mountPath: /var/lib/ratchet/bases, readOnly: true}
{{- end }}
{{- end -}}

{{- define "ratchet.volumes" -}}
{{- $top := index . 0 -}}{{- $part := index . 1 -}}
- name: settings
  configMap: {name: {{ include "ratchet.fullname" $top }}}
- name: user
  emptyDir: {sizeLimit: 5Gi}
- name: tmp
  emptyDir: {sizeLimit: 10Gi}
{{- with $top.Values.kafka.existingSecret }}
{{- if and .name (has $part (list "ingest" "maintain" "console")) }}
- name: kafka
  secret: {secretName: {{ .name }}, defaultMode: 0440}
{{- end }}
{{- end }}
{{- if and (eq $top.Values.bases.source "volume") (has $part (list "serving" "updater" "indexes")) }}
- name: bases
  persistentVolumeClaim: {claimName: {{ $top.Values.bases.existingClaim }}, readOnly: true}
{{- end }}
{{- end -}}

{{/* Ends before the other containers start, when the bases that the settings name are in ratchet's home: (list $ "serving"). */}}
{{- define "ratchet.bases" -}}
{{- $top := index . 0 -}}
{{- $base := default (dict) $top.Values.settings.base -}}
{{- $names := list (default "shipped" $base.clip) (hasKey $base "vlm" | ternary $base.vlm "shipped-vlm") | compact -}}
- name: bases
  {{- include "ratchet.container" . | nindent 2 }}
  {{- if eq $top.Values.bases.source "build" }}
  command: [ratchet, base, build{{ if lt (len $names) 2 }}, --family, clip{{ end }}]
  {{- else if eq $top.Values.bases.source "artifacts" }}
  command: [ratchet, base, pull, {{ join ", " $names }}]
  {{- else }}
  command: [ratchet, base, show, {{ join ", " $names }}]
  {{- end }}
  env:
    {{- include "ratchet.env" (list $top "bases") | nindent 4 }}
    {{- include "ratchet.addedEnv" (list $top) | nindent 4 }}
  resources: {{- toYaml $top.Values.bases.resources | nindent 4 }}
  volumeMounts:
    {{- include "ratchet.mounts" . | nindent 4 }}
    {{- include "ratchet.addedMounts" $top | nindent 4 }}
{{- end -}}

{{/* Resources of a container, its GPUs included: values with `resources` and `gpus`. */}}
{{- define "ratchet.resources" -}}
{{- $resources := deepCopy .resources }}
{{- if .gpus }}
{{- $gpu := dict "nvidia.com/gpu" (.gpus | int) }}
{{- $resources = mergeOverwrite $resources (dict "limits" $gpu "requests" $gpu) }}
{{- end }}
{{- toYaml $resources }}
{{- end -}}

{{/* Three probes of one endpoint: (dict "path" "/metrics" "port" "metrics" "timeout" 5 "start" 30). */}}
{{- define "ratchet.probes" -}}
startupProbe:
  httpGet: {path: {{ .path }}, port: {{ .port }}}
  periodSeconds: 10
  timeoutSeconds: {{ .timeout }}
  failureThreshold: {{ .start }}
livenessProbe:
  httpGet: {path: {{ .path }}, port: {{ .port }}}
  periodSeconds: 20
  timeoutSeconds: {{ .timeout }}
  failureThreshold: 6
readinessProbe:
  httpGet: {path: {{ default .path .ready }}, port: {{ default .port .readyPort }}}
  periodSeconds: 10
  timeoutSeconds: {{ default .timeout .readyTimeout }}
  failureThreshold: 3
{{- end -}}
