//! The parts of the Helm chart that say what the code says: kinds, roles and policies, as templates. Pure: `generate`
//! writes them to `charts/virtmark/templates/`. What pods look like is written there by hand.

/// Stands for the release's namespace in an object, until it is a template.
pub const NAMESPACE: &str = "release-namespace-of-the-chart";

/// The ClusterRoles that the cluster's own roles may take in, and the value that lists those.
const AGGREGATED: [(&str, &str); 2] =
    [("virtmark-view", "aggregateViewTo"), ("virtmark-backup", "aggregateBackupTo")];

/// The template of a kind, from its YAML.
pub fn kind(yaml: &str) -> String {
    let keep =
        "  {{- if .Values.crds.keep }}\n  annotations:\n    helm.sh/resource-policy: keep\n  {{- end }}\n";
    let object = described(&escaped(yaml), &format!("{keep}{LABELS}"));
    format!("{{{{- if .Values.crds.enabled }}}}\n{object}{{{{- end }}}}\n")
}

/// The template of a role, an account or a policy of this name, from its YAML, which has [`NAMESPACE`] for a namespace.
pub fn access(name: &str, yaml: &str) -> String {
    let value = AGGREGATED.iter().find(|(role, _)| *role == name).map(|(_, value)| value);
    let aggregated = value.map_or_else(String::new, |value| {
        format!(
            "    {{{{- range .Values.rbac.{value} }}}}\n    rbac.authorization.k8s.io/aggregate-to-{{{{ . }}}}: \"true\"\n    \
             {{{{- end }}}}\n"
        )
    });
    described(&escaped(yaml), &format!("{LABELS}{aggregated}"))
        // a namespace may look like a number
        .replace(&format!(": {NAMESPACE}\n"), ": {{ .Release.Namespace | quote }}\n")
        .replace(NAMESPACE, "{{ .Release.Namespace }}")
}

const LABELS: &str = "  labels:\n    {{- include \"virtmark.labels\" . | nindent 4 }}\n";

/// With more of an object's metadata, before its name.
fn described(yaml: &str, metadata: &str) -> String {
    yaml.replacen("\nmetadata:\n", &format!("\nmetadata:\n{metadata}"), 1)
}

/// As text that a template prints as it is.
fn escaped(text: &str) -> String {
    text.replace("{{", "{{ \"{{\" }}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_can_be_left_out_and_kept() {
        let made = kind("kind: K\nmetadata:\n  name: k\nspec:\n  text: a {{b}}\n");
        assert_eq!(
            made,
            "{{- if .Values.crds.enabled }}\nkind: K\nmetadata:\n  {{- if .Values.crds.keep }}\n  annotations:\n    \
             helm.sh/resource-policy: keep\n  {{- end }}\n  labels:\n    {{- include \"virtmark.labels\" . | nindent 4 }}\n  \
             name: k\nspec:\n  text: a {{ \"{{\" }}b}}\n{{- end }}\n"
        );
    }

    #[test]
    fn a_role_is_in_the_namespace_of_the_release_and_can_be_aggregated() {
        let role = |name: &str| {
            access(name, &format!("kind: R\nmetadata:\n  namespace: {NAMESPACE}\nwho: 'a:{NAMESPACE}:b'\n"))
        };
        let made = role("virtmark-agent");
        assert!(made.contains("  namespace: {{ .Release.Namespace | quote }}\n"), "{made}");
        assert!(made.contains("who: 'a:{{ .Release.Namespace }}:b'\n"), "{made}");
        assert!(!made.contains(".Values.rbac"), "{made}");
        for (name, value) in AGGREGATED {
            assert!(role(name).contains(&format!("range .Values.rbac.{value} }}")), "{name}");
        }
    }
}
