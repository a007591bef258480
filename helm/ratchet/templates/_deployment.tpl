{{/* A Deployment of one ratchet command: (dict "top" $ "part" "ingest" "values" .Values.ingest "command" "ingest"
     "port" 9464 "portName" "metrics" "path" "/metrics" "replicas" 1). The old pod ends before a new one starts: none of
     them gains from a double, and of two that write the same table one is sent back. "topic": one that is bound to a
     source, whose name may have what a name of Kubernetes may not. */}}
{{- define "ratchet.deployment" -}}
{{- $top := .top -}}
{{- $bound := .topic | empty | ternary "" (.topic | default "" | sha256sum | trunc 8) -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ include "ratchet.fullname" $top }}-{{ .part }}{{ with $bound }}-{{ . }}{{ end }}
  labels:
    {{- include "ratchet.labels" $top | nindent 4 }}
    app.kubernetes.io/component: {{ .part }}
    {{- with $bound }}
    ratchet/topic: {{ quote . }}
    {{- end }}
spec:
  {{- if .replicas }}
  replicas: {{ .replicas }}
  {{- end }}
  {{- if has .part (list "updater" "maintain") }}
  strategy: {type: Recreate}
  {{- else }}
  strategy: {type: RollingUpdate, rollingUpdate: {maxSurge: 0, maxUnavailable: 1}}
  {{- end }}
  selector:
    matchLabels:
      {{- include "ratchet.selector" (list $top .part) | nindent 6 }}
      {{- with $bound }}
      ratchet/topic: {{ quote . }}
      {{- end }}
    {{- if and (eq .part "ingest") (not $bound) }}
    matchExpressions: [{key: ratchet/topic, operator: DoesNotExist}]
    {{- end }}
  template:
    metadata:
      labels:
        {{- include "ratchet.labels" $top | nindent 8 }}
        app.kubernetes.io/component: {{ .part }}
        {{- with $bound }}
        ratchet/topic: {{ quote . }}
        {{- end }}
      annotations:
        checksum/settings: {{ include (print $top.Template.BasePath "/configmap.yaml") $top | sha256sum }}
        {{- include "ratchet.addedAnnotations" $top | nindent 8 }}
    spec:
      {{- include "ratchet.podSpec" (list $top .part .values) | nindent 6 }}
      terminationGracePeriodSeconds: 60
      {{- if has .part (list "updater" "indexes") }}
      initContainers:
        {{- include "ratchet.bases" (list $top .part) | nindent 8 }}
      {{- end }}
      containers:
        - name: {{ .part }}
          {{- include "ratchet.container" (list $top .part) | nindent 10 }}
          command: [ratchet, {{ .command }}{{ with .topic }}, --topic, {{ quote . }}{{ end }}]
          env:
            {{- include "ratchet.env" (list $top .part) | nindent 12 }}
            {{- include "ratchet.addedEnv" (list $top .values) | nindent 12 }}
            {{- with .values.env }}
            {{- toYaml . | nindent 12 }}
            {{- end }}
          ports:
            - {name: {{ .portName }}, containerPort: {{ .port }}}
          {{- include "ratchet.probes" (dict "path" .path "port" .portName "ready" .ready "timeout" 10 "start" 60) | nindent 10 }}
          resources:
            {{- include "ratchet.resources" .values | nindent 12 }}
          volumeMounts:
            {{- include "ratchet.mounts" (list $top .part) | nindent 12 }}
            {{- include "ratchet.addedMounts" $top | nindent 12 }}
            {{- if .values.sharedMemory }}
            - {name: shm, mountPath: /dev/shm}
            {{- end }}
            {{- if dig "data" "existingClaim" "" .values }}
            - {name: data, mountPath: /data, readOnly: true}
            {{- end }}
      volumes:
        {{- include "ratchet.volumes" (list $top .part) | nindent 8 }}
        {{- include "ratchet.addedVolumes" $top | nindent 8 }}
        - name: home
          {{- $size := dig "storage" "sizeLimit" "1Gi" .values }}
          {{- if dig "storage" "existingClaim" "" .values }}
          persistentVolumeClaim: {claimName: {{ .values.storage.existingClaim }}}
          {{- else if dig "storage" "storageClass" "" .values }}
          ephemeral: # a volume of each pod's own, which goes with it
            volumeClaimTemplate:
              spec:
                accessModes: [ReadWriteOnce]
                storageClassName: {{ .values.storage.storageClass }}
                resources: {requests: {storage: {{ $size }}}}
          {{- else }}
          emptyDir: {sizeLimit: {{ $size }}}
          {{- end }}
        {{- if .values.sharedMemory }}
        - name: shm
          emptyDir: {medium: Memory, sizeLimit: {{ .values.sharedMemory }}}
        {{- end }}
        {{- if dig "data" "existingClaim" "" .values }}
        - name: data
          persistentVolumeClaim: {claimName: {{ .values.data.existingClaim }}, readOnly: true}
        {{- end }}
{{- end -}}
