{{/* Labels of every object. */}}
{{- define "virtmark.labels" -}}
app.kubernetes.io/name: virtmark
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: virtmark
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The same, and those that the user wants on an object besides, which count more: (list root labels). */}}
{{- define "virtmark.labelsAnd" -}}
{{ toYaml (merge (dict) (index . 1) (fromYaml (include "virtmark.labels" (index . 0)))) }}
{{- end }}

{{/* What selects the pods of a component: (list root "operator"). It must never change. */}}
{{- define "virtmark.selector" -}}
app.kubernetes.io/name: virtmark
app.kubernetes.io/instance: {{ (index . 0).Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* Labels of a component's objects: (list root "operator"). */}}
{{- define "virtmark.componentLabels" -}}
{{ include "virtmark.labels" (index . 0) }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{/* The reference of an image: (list root image). */}}
{{- define "virtmark.image" -}}
{{- $root := index . 0 }}
{{- with index . 1 -}}
{{ .registry }}/{{ .repository }}
{{- if .digest }}@{{ .digest }}{{ else }}:{{ .tag | default $root.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}
