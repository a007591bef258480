{{/* Ray's and Serve's switches are read at import in every process, so they are in the environment of each container. */}}
{{- define "ratchet.rayEnv" -}}
- name: RAY_USAGE_STATS_ENABLED
  value: "0"
- name: RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO
  value: "0"
- name: RAY_SERVE_ENABLE_HA_PROXY
  value: "1"
- name: RAY_SERVE_HAPROXY_BINARY_PATH # corrects Ray's configuration of HAProxy, then becomes it
  value: /usr/local/bin/ratchet-haproxy
- name: RAY_SERVE_HAPROXY_MAXCONN
  value: {{ dig "serve" "connections" 4096 .Values.settings | int | quote }}
- name: FORWARDED_ALLOW_IPS # uvicorn would believe the X-Forwarded-For of any client that comes through HAProxy
  value: none
- name: RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S # after 5 s Serve would end a proxy that still starts
  value: "60"
- name: RAY_SERVE_MAX_PER_REPLICA_RETRY_COUNT # a VLM that cannot start is tried again without end
  value: "1000000"
- name: RAY_task_events_report_interval_ms # the head would keep an event of each of 100,000 calls
  value: "0"
- name: GOMP_SPINCOUNT # as in serving.ray.ray_session
  value: "5000"
- name: RAY_SERVE_THROUGHPUT_OPTIMIZED
  value: "1"
- name: RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH # 4 MiB is a picture of 1.4 megapixels
  value: "2147483647"
- name: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S # of a node that is told to end, see ratchet.drainSeconds
  value: {{ include "ratchet.drainSeconds" . | quote }}
- name: RAY_LOG_TO_STDERR # of all of Ray's processes, so that `kubectl logs` has what replicas log
  value: "1"
- name: RAY_SERVE_LOG_TO_STDERR # else Serve keeps what replicas log in files of its own
  value: "1"
- name: RAY_BACKEND_LOG_LEVEL # of Ray's processes in C++
  value: warning
- name: RAY_LOGGER_LEVEL # of those in Python: its autoscaler would write a page every 5 s
  value: warning
{{- with dig "traces" "endpoint" "" .Values.settings }}
- name: RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH # as in serving.ray.ray_session.tracing_environment
  value: core.tracing:span_processors
- name: RAY_SERVE_TRACING_SAMPLING_RATIO
  value: {{ dig "traces" "share" 0.01 $.Values.settings | quote }}
- name: OTEL_EXPORTER_OTLP_TRACES_ENDPOINT
  value: {{ . | quote }}
- name: OTEL_SERVICE_NAME
  value: ratchet-serve
{{- end }}
- name: PROMETHEUS_MULTIPROC_DIR
  value: /run/ratchet/metrics
- name: OMP_NUM_THREADS # encoders set their own number
  value: "1"
{{- end -}}

{{/* How long a node that ends (SIGTERM) may take. Serve stops its replicas a request's deadline and 5 s before this is
over, or when their successors run elsewhere, which takes encoders half a minute and a VLM one or two. */}}
{{- define "ratchet.drainSeconds" -}}
{{- add (dig "serve" "deadline_seconds" 30 .Values.settings | ceil | int) 120 -}}
{{- end -}}

{{/* Whether Ray adds and ends workers of the serving cluster. */}}
{{- define "ratchet.autoscales" -}}
{{- if gt (.Values.serving.workers.maxReplicas | int) (.Values.serving.workers.replicas | int) }}true{{ end -}}
{{- end -}}

{{/* Ray's autoscaler, which KubeRay puts beside the head with a Role of its own: (list $ idleSeconds). */}}
{{- define "ratchet.autoscaler" -}}
{{- $top := index . 0 -}}
upscalingMode: Default
idleTimeoutSeconds: {{ index . 1 | int }}
image: {{ include "ratchet.image" (list $top "serving") }} # Ray's own is another version's
imagePullPolicy: {{ $top.Values.image.pullPolicy }}
securityContext: {{- include "ratchet.containerSecurity" $top | nindent 2 }}
env:
  - {name: HOME, value: /home/ratchet}
  {{- include "ratchet.addedEnv" (list $top) | nindent 2 }}
volumeMounts:
  - {name: user, mountPath: /home/ratchet}
  - {name: tmp, mountPath: /tmp}
  {{- include "ratchet.addedMounts" $top | nindent 2 }}
resources: {{- toYaml $top.Values.serving.autoscaler.resources | nindent 2 }}
{{- end -}}

{{/* CPUs that KubeRay tells Ray a container has: its limit, else its request, rounded up. */}}
{{- define "ratchet.rayCpus" -}}
{{- $cpu := dig "limits" "cpu" "" . | default (dig "requests" "cpu" "0" .) | toString -}}
{{- hasSuffix "m" $cpu | ternary (divf (trimSuffix "m" $cpu) 1000) (float64 $cpu) | ceil -}}
{{- end -}}

{{/* Replicas of a deployment at the least, as in serving/app.py: (list settings.serve "encoder"). */}}
{{- define "ratchet.replicas" -}}
{{- $serve := index . 0 -}}{{- $key := index . 1 -}}
{{- $ingresses := dig "ingress_replicas" 1 $serve | int -}}
{{- eq $key "controller" | ternary (min 2 $ingresses) (dig (printf "%s_replicas" $key) 1 $serve | int) -}}
{{- end -}}

{{/* Stops where the workers have fewer CPUs of Ray than the replicas reserve: the application would be deployed for ever, and
an upgrade to it would leave the cluster before as it is, while Helm says that all is well. */}}
{{- define "ratchet.roomForReplicas" -}}
{{- $serve := default (dict) .Values.settings.serve -}}
{{- $reserved := dict "encoder" 0.2 "ingress" 0.2 "controller" 0.1 "vlm" 0.2 -}}{{/* serving/app.py, where serving.actors names none */}}
{{- $total := 0.1 -}}{{/* the catalog */}}
{{- range $key, $cpus := $reserved -}}
{{- if or (ne $key "vlm") (dig "base" "vlm" "shipped-vlm" $.Values.settings) -}}
{{- $each := dig $key "cpus" $cpus $.Values.serving.actors -}}
{{- $total = addf $total (mulf (include "ratchet.replicas" (list $serve $key)) $each) -}}
{{- end -}}
{{- end -}}
{{- $workers := max (.Values.serving.workers.replicas | int) (.Values.serving.workers.maxReplicas | int) -}}
{{- $each := include "ratchet.rayCpus" .Values.serving.workers.resources -}}
{{- if gt (round $total 3) (mulf $workers $each) -}}
{{- fail (printf "serving.workers has no room: the replicas reserve %v CPUs of Ray (serving.actors, settings.serve.*_replicas), and %d worker(s) have %s each (resources.limits.cpu, else requests.cpu, rounded up)." (round $total 3) (int $workers) $each) -}}
{{- end -}}
{{- end -}}

{{/* Names a Ray cluster by what it is started with, in a label of its pods. KubeRay compares neither numbers of workers nor
tolerations, and Serve reads its HTTP options only when it starts: by this label a change of them makes another cluster,
too. Left out is what changes in the running one. */}}
{{- define "ratchet.cluster" -}}
{{- $started := omit .Values.serving "actors" "upgradeStrategy" "podDisruptionBudget" | toJson -}}
{{- $head := include "ratchet.rayPodSpec" (list . "serving-head" .Values.serving.head) -}}
{{- $worker := include "ratchet.rayPodSpec" (list . "serving-worker" .Values.serving.workers) -}}
{{- $settings := include (print .Template.BasePath "/configmap.yaml") . -}}
{{- print $started $head $worker $settings (include "ratchet.addedAnnotations" .) | sha256sum | trunc 12 -}}
{{- end -}}

{{/* Annotation of what KubeRay's Job that removes the cluster's keys from Redis needs: it starts when `helm uninstall` has
deleted the rest, and has the head's volumes, service account and priority. */}}
{{- define "ratchet.keptForCleanUp" -}}
{{- if .Values.serving.gcsFaultTolerance.enabled }}helm.sh/resource-policy: keep{{ end -}}
{{- end -}}

{{/* KubeRay deletes an object when its pods have ended, minutes after `helm uninstall`. An install meanwhile would adopt the
object, and lose it: (list $ "RayService" name). */}}
{{- define "ratchet.notBeingDeleted" -}}
{{- $top := index . 0 -}}{{- $kind := index . 1 -}}{{- $name := index . 2 -}}
{{- if dig "metadata" "deletionTimestamp" "" (lookup "ray.io/v1" $kind $top.Release.Namespace $name) -}}
{{- fail (printf "%s %s of an earlier installation is still being deleted, which takes as long as its pods drain. Wait, and repeat: kubectl -n %s wait --for=delete %s/%s --timeout=10m" $kind $name $top.Release.Namespace (lower $kind) $name) -}}
{{- end -}}
{{- end -}}

{{/* The pod of a head or of a worker: (list $ "serving-head" values). */}}
{{- define "ratchet.rayPod" -}}
{{- $top := index . 0 -}}{{- $part := index . 1 -}}
metadata:
  labels:
    app.kubernetes.io/part-of: ratchet
    {{- include "ratchet.selector" (list $top $part) | nindent 4 }}
    ratchet/cluster: {{ include "ratchet.cluster" $top | quote }}
  {{- with include "ratchet.addedAnnotations" $top }}
  annotations: {{- . | nindent 4 }}
  {{- end }}
spec: {{- include "ratchet.rayPodSpec" . | nindent 2 }}
{{- end -}}

{{- define "ratchet.rayPodSpec" -}}
{{- $top := index . 0 -}}{{- $part := index . 1 -}}{{- $values := index . 2 -}}
{{- $head := eq $part "serving-head" -}}
{{ include "ratchet.podSpec" (list $top $part $values (and $head (include "ratchet.autoscales" $top))) }}
terminationGracePeriodSeconds: {{ add (include "ratchet.drainSeconds" $top | int) 15 }}
shareProcessNamespace: true # the exporter asks whether the processes that wrote metrics still live
initContainers:
  {{- include "ratchet.bases" (list $top "serving") | nindent 2 }}
containers:
  - name: ray # KubeRay takes the first container for Ray's
    {{- include "ratchet.container" (list $top $part) | nindent 4 }}
    env:
      {{- include "ratchet.env" (list $top "serving") | nindent 6 }}
      {{- include "ratchet.rayEnv" $top | nindent 6 }}
      {{- include "ratchet.addedEnv" (list $top $values) | nindent 6 }}
    ports:
      - {name: agent, containerPort: 52365, protocol: TCP}
      - {name: metrics, containerPort: 8080, protocol: TCP}
      - {name: serve, containerPort: 8000, protocol: TCP} # KubeRay looks for it on the head, too
      {{- if $head }}
      - {name: gcs-server, containerPort: 6379, protocol: TCP}
      - {name: dashboard, containerPort: 8265, protocol: TCP}
      - {name: client, containerPort: 10001, protocol: TCP}
      {{- end }}
    {{- if $head }}
    {{- include "ratchet.probes" (dict "path" "/api/healthz" "port" "agent" "timeout" 5 "start" 60) | nindent 4 }}
    {{- else }}
    # Alive: Ray's own processes. Serve replaces replicas that are not, so /health/live is no reason to end the pod.
    # Ready: a release is live and a text went through an encoder, asked through this pod's proxy.
    {{- include "ratchet.probes" (dict "path" "/api/healthz" "port" "agent" "timeout" 5 "start" 60 "ready" "/health/ready" "readyPort" "serve" "readyTimeout" 12) | nindent 4 }}
    {{- end }}
    resources:
      {{- include "ratchet.resources" $values | nindent 6 }}
    volumeMounts:
      {{- include "ratchet.mounts" (list $top "serving") | nindent 6 }}
      {{- include "ratchet.addedMounts" $top | nindent 6 }}
      - {name: metrics, mountPath: /run/ratchet/metrics}
      - {name: shm, mountPath: /dev/shm}
  - name: exporter
    {{- include "ratchet.container" (list $top $part) | nindent 4 }}
    command: [ratchet, metrics, serve, /run/ratchet/metrics, --port, {{ $top.Values.serving.exporter.port | int | quote }}, --host, "0.0.0.0"]
    env:
      - {name: HOME, value: /home/ratchet}
      {{- include "ratchet.addedEnv" (list $top) | nindent 6 }}
    ports:
      - {name: exporter, containerPort: {{ $top.Values.serving.exporter.port | int }}, protocol: TCP}
    {{- include "ratchet.probes" (dict "path" "/metrics" "port" "exporter" "timeout" 10 "start" 30) | nindent 4 }}
    resources: {{- toYaml $top.Values.serving.exporter.resources | nindent 6 }}
    volumeMounts:
      - {name: user, mountPath: /home/ratchet}
      - {name: tmp, mountPath: /tmp}
      - {name: metrics, mountPath: /run/ratchet/metrics}
      {{- include "ratchet.addedMounts" $top | nindent 6 }}
volumes:
  {{- include "ratchet.volumes" (list $top "serving") | nindent 2 }}
  {{- include "ratchet.addedVolumes" $top | nindent 2 }}
  - name: home
    emptyDir: {sizeLimit: 50Gi}
  - name: metrics
    emptyDir: {sizeLimit: 256Mi}
  - name: shm
    emptyDir: {medium: Memory, sizeLimit: {{ default "512Mi" $values.sharedMemory }}}
{{- end -}}

{{/* Where the updater finds the cluster that trains, by the name that KubeRay gives to the head's service. */}}
{{- define "ratchet.trainingAddress" -}}
ray://{{ include "ratchet.fullname" . }}-training-head-svc:10001
{{- end -}}

{{/* The pod of a head or of a worker that trains: (list $ "training-worker" values). All see the updater's home. */}}
{{- define "ratchet.trainingPod" -}}
{{- $top := index . 0 -}}{{- $part := index . 1 -}}{{- $values := index . 2 -}}
{{- $head := eq $part "training-head" -}}
{{- $updater := $top.Values.updater -}}
metadata:
  labels:
    app.kubernetes.io/part-of: ratchet
    {{- include "ratchet.selector" (list $top $part) | nindent 4 }}
  annotations:
    {{- include "ratchet.addedAnnotations" $top | nindent 4 }}
spec:
  {{- include "ratchet.podSpec" (list $top $part $values $head) | nindent 2 }}
  containers:
    - name: ray
      {{- include "ratchet.container" (list $top $part) | nindent 6 }}
      env:
        - {name: HOME, value: /home/ratchet}
        - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
        - {name: OMP_NUM_THREADS, value: "1"} # workers set their own number
        {{- include "ratchet.storeEnv" $top | nindent 8 }} # they read their samples from the lake
        {{- include "ratchet.addedEnv" (list $top $values) | nindent 8 }}
      ports:
        - {name: agent, containerPort: 52365, protocol: TCP}
        {{- if $head }}
        - {name: gcs-server, containerPort: 6379, protocol: TCP}
        - {name: dashboard, containerPort: 8265, protocol: TCP}
        - {name: client, containerPort: 10001, protocol: TCP}
        {{- end }}
      {{- include "ratchet.probes" (dict "path" "/api/healthz" "port" "agent" "timeout" 5 "start" 60) | nindent 6 }}
      resources:
        {{- include "ratchet.resources" $values | nindent 8 }}
      volumeMounts:
        {{- include "ratchet.mounts" (list $top "updater") | nindent 8 }}
        {{- include "ratchet.addedMounts" $top | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
        {{- if $updater.data.existingClaim }}
        - {name: data, mountPath: /data, readOnly: true}
        {{- end }}
  volumes:
    {{- include "ratchet.volumes" (list $top "updater") | nindent 4 }}
    {{- include "ratchet.addedVolumes" $top | nindent 4 }}
    - name: home
      persistentVolumeClaim: {claimName: {{ $updater.storage.existingClaim }}}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ default "1Gi" $values.sharedMemory }}}
    {{- if $updater.data.existingClaim }}
    - name: data
      persistentVolumeClaim: {claimName: {{ $updater.data.existingClaim }}, readOnly: true}
    {{- end }}
{{- end -}}
