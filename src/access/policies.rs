//! ValidatingAdmissionPolicies: what RBAC cannot say.

use serde_json::{Value, json};

use super::{AGENT_ACCOUNT, OPERATOR_ACCOUNT, user};
use crate::api::{self, AUTHORITY, GROUP, LABEL_BACKUP, SIGNER, TICKET_SECRET_TYPE};

/// The node that a token is bound to (`kubectl create token --bound-object-kind=Node`, and every pod's token);
/// empty when it is bound to none.
const TOKEN_NODE: &str = "has(request.userInfo.extra) && 'authentication.kubernetes.io/node-name' in request.userInfo.extra \
     ? request.userInfo.extra['authentication.kubernetes.io/node-name'][0] : ''";

/// All of them, each with its binding, for operator and agents in `namespace`.
pub fn all(namespace: &str) -> Vec<Value> {
    let agent = user(namespace, AGENT_ACCOUNT);
    let operator = user(namespace, OPERATOR_ACCOUNT);
    [
        agent_status(&agent),
        agent_sightings(&agent),
        agent_heartbeat(&agent),
        agent_tickets(&agent),
        agent_transfers(&agent),
        agent_requests(&agent),
        operator_secrets(&operator),
        operator_authority(&operator, namespace),
        backups(),
        imports(&operator),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// An agent writes the status of what is bound to its node, before and after the write.
fn agent_status(agent: &str) -> Vec<Value> {
    let kinds = ["vmbackups/status", "vmcheckpoints/status", "imagetransfers/status"];
    Policy::new("virtmark-agent-status", GROUP, &kinds, &["UPDATE"])
        .only_for(agent)
        .variable("node", TOKEN_NODE)
        .variable(
            "was",
            "has(oldObject.status) && has(oldObject.status.nodeName) ? oldObject.status.nodeName : ''",
        )
        .variable("is", "has(object.status) && has(object.status.nodeName) ? object.status.nodeName : ''")
        .require("variables.node != ''", "the token is not bound to a node")
        .require("variables.was == variables.node", "the object is not bound to the token's node")
        .require("variables.is == variables.node", "an agent cannot give an object to another node")
        .require(
            "!has(object.status.ticketSecret) || object.status.ticketSecret.startsWith('ticket-' + object.metadata.uid + '-')",
            "the ticket's Secret is not named after the transfer",
        )
        .require(
            "(has(object.status.toCheckpoint) ? object.status.toCheckpoint : '') == \
             (has(oldObject.status.toCheckpoint) ? oldObject.status.toCheckpoint : '')",
            "an agent cannot name another checkpoint",
        )
        .build(None)
}

/// An agent tells of its own node only, at a name that says so.
fn agent_sightings(agent: &str) -> Vec<Value> {
    Policy::new("virtmark-agent-sightings", GROUP, &["domainsightings"], &["CREATE", "UPDATE", "DELETE"])
        .only_for(agent)
        .variable("node", TOKEN_NODE)
        .require("variables.node != ''", "the token is not bound to a node")
        .require(
            "oldObject == null || oldObject.spec.nodeName == variables.node",
            "the sighting is another node's",
        )
        .require(
            "object == null || object.spec.nodeName == variables.node",
            "an agent tells of its own node only",
        )
        .require(
            "object == null || object.metadata.name == variables.node + '.' + object.spec.uuid",
            "a sighting's name is <node>.<uuid>",
        )
        .require(
            "object == null || !has(object.metadata.finalizers) && !has(object.metadata.ownerReferences)",
            "an agent writes neither finalizers nor owner references",
        )
        .build(None)
}

/// An agent says of itself only that it lives.
fn agent_heartbeat(agent: &str) -> Vec<Value> {
    let name = api::agent_lease("");
    Policy::new("virtmark-agent-heartbeat", "coordination.k8s.io", &["leases"], &["CREATE", "UPDATE"])
        .only_for(agent)
        .variable("node", TOKEN_NODE)
        .require("variables.node != ''", "the token is not bound to a node")
        .require(
            &format!("object.metadata.name == '{name}' + variables.node"),
            "an agent renews the Lease of its own node only",
        )
        .build(None)
}

const OWNERS: &str = "has(object.metadata.ownerReferences) ? object.metadata.ownerReferences : []";

/// An agent creates the Secrets of tickets, and no other. Their label leads to the policy of their transfers.
fn agent_tickets(agent: &str) -> Vec<Value> {
    Policy::new("virtmark-agent-tickets", "", &["secrets"], &["CREATE"])
        .only_for(agent)
        .variable("node", TOKEN_NODE)
        .variable("owners", OWNERS)
        .require("variables.node != ''", "the token is not bound to a node")
        .require(
            &format!("has(object.type) && object.type == '{TICKET_SECRET_TYPE}'"),
            "an agent creates Secrets of tickets only",
        )
        .require(
            &format!(
                "variables.owners.size() == 1 && variables.owners[0].kind == 'ImageTransfer' \
                 && variables.owners[0].apiVersion.startsWith('{GROUP}/') \
                 && object.metadata.name.startsWith('ticket-' + variables.owners[0].uid + '-')"
            ),
            "a ticket's Secret belongs to one ImageTransfer, and is named after it",
        )
        .require(
            &format!("has(object.metadata.labels) && '{LABEL_BACKUP}' in object.metadata.labels"),
            &format!("a ticket's Secret has the label {LABEL_BACKUP}"),
        )
        .require("!has(object.metadata.finalizers)", "an agent writes no finalizers")
        .build(None)
}

/// And for transfers bound to its node. Every ImageTransfer of the namespace is a parameter: the policy is asked once for
/// each, and the one that owns the Secret must be bound to the token's node. It is denied where there are none, and that is
/// found before it is known who asks: without the label nobody could create any Secret in a namespace without transfers.
fn agent_transfers(agent: &str) -> Vec<Value> {
    let parameters = json!({"selector": {}, "parameterNotFoundAction": "Deny"});
    Policy::new("virtmark-agent-transfers", "", &["secrets"], &["CREATE"])
        .only_for(agent)
        .only_labelled(LABEL_BACKUP)
        .with_parameters("ImageTransfer")
        .variable("node", TOKEN_NODE)
        .variable("owners", OWNERS)
        .require(
            // how many owners there are is the other policy's: each refusal has one that says why
            "variables.owners.size() != 1 || params.metadata.uid != variables.owners[0].uid \
             || has(params.status) && has(params.status.nodeName) && params.status.nodeName == variables.node",
            "the transfer is not bound to the token's node",
        )
        .build(Some(parameters))
}

/// An agent asks for certificates of our signer only. Whether it may have what it asks for the operator decides.
fn agent_requests(agent: &str) -> Vec<Value> {
    Policy::new(
        "virtmark-agent-requests",
        "certificates.k8s.io",
        &["certificatesigningrequests"],
        &["CREATE"],
    )
    .only_for(agent)
    .variable("node", TOKEN_NODE)
    .require("variables.node != ''", "the token is not bound to a node")
    .require(
        &format!("object.spec.signerName == '{SIGNER}'"),
        &format!("an agent asks for certificates of {SIGNER} only"),
    )
    .build(None)
}

/// The operator deletes the Secrets of tickets, and no other.
fn operator_secrets(operator: &str) -> Vec<Value> {
    Policy::new("virtmark-operator-secrets", "", &["secrets"], &["DELETE"])
        .only_for(operator)
        .require(
            &format!("has(oldObject.type) && oldObject.type == '{TICKET_SECRET_TYPE}'"),
            "the operator deletes Secrets of tickets only",
        )
        .build(None)
}

/// It creates one Secret of another kind: its CA's. Any other type might be given a token of somebody else's.
fn operator_authority(operator: &str, namespace: &str) -> Vec<Value> {
    Policy::new("virtmark-operator-ca", "", &["secrets"], &["CREATE"])
        .only_for(operator)
        .require(
            &format!(
                "has(object.type) && object.type == 'kubernetes.io/tls' && object.metadata.name == '{AUTHORITY}' \
                 && object.metadata.namespace == '{namespace}'"
            ),
            "the operator creates the Secret of its CA only",
        )
        .build(None)
}

/// Who creates a VmBackup must have the verb `backup` on the LibvirtDomain that it names.
fn backups() -> Vec<Value> {
    Policy::new("virtmark-backup-verb", GROUP, &["vmbackups"], &["CREATE"]).require_backup_verb().build(None)
}

/// And who creates a VmCheckpoint, for bitmaps that are there already: they go with it. The operator makes one with each
/// backup that was allowed.
fn imports(operator: &str) -> Vec<Value> {
    Policy::new("virtmark-import-verb", GROUP, &["vmcheckpoints"], &["CREATE"])
        .for_all_but(operator)
        .require_backup_verb()
        .build(None)
}

fn may_back_up() -> Value {
    json!({
        "expression": format!(
            "authorizer.group('{GROUP}').resource('libvirtdomains').namespace(request.namespace)\
             .name(object.spec.vm).check('backup').allowed()"),
        "messageExpression":
            "'NotPermitted: ' + request.userInfo.username + ' may not back up VM ' + object.spec.vm + \
             ': it needs the verb backup on libvirtdomains of group virtmark.dev in namespace ' + request.namespace",
        "reason": "Forbidden",
    })
}

/// A policy in the making.
struct Policy {
    name: &'static str,
    rule: Value,
    label: Option<&'static str>,
    who: Option<String>,
    parameters: Option<&'static str>,
    variables: Vec<Value>,
    validations: Vec<Value>,
}

impl Policy {
    fn new(name: &'static str, group: &str, resources: &[&str], operations: &[&str]) -> Self {
        let version = if group.is_empty() { "v1" } else { "*" };
        let rule = json!({"apiGroups": [group], "apiVersions": [version], "resources": resources,
            "operations": operations});
        Self {
            name,
            rule,
            label: None,
            who: None,
            parameters: None,
            variables: Vec::new(),
            validations: Vec::new(),
        }
    }

    fn only_labelled(mut self, label: &'static str) -> Self {
        self.label = Some(label);
        self
    }

    fn only_for(mut self, user: &str) -> Self {
        self.who = Some(format!("request.userInfo.username == '{user}'"));
        self
    }

    fn for_all_but(mut self, user: &str) -> Self {
        self.who = Some(format!("request.userInfo.username != '{user}'"));
        self
    }

    fn require_backup_verb(mut self) -> Self {
        self.validations.push(may_back_up());
        self
    }

    fn with_parameters(mut self, kind: &'static str) -> Self {
        self.parameters = Some(kind);
        self
    }

    fn variable(mut self, name: &str, expression: &str) -> Self {
        self.variables.push(json!({"name": name, "expression": expression}));
        self
    }

    fn require(mut self, expression: &str, message: &str) -> Self {
        self.validations.push(json!({"expression": expression, "message": message, "reason": "Forbidden"}));
        self
    }

    /// The policy and its binding.
    fn build(self, parameters: Option<Value>) -> Vec<Value> {
        let version = "admissionregistration.k8s.io/v1";
        let mut spec = json!({
            "failurePolicy": "Fail",
            "matchConstraints": {"resourceRules": [self.rule]},
            "validations": self.validations,
        });
        if let Some(label) = self.label {
            let labelled = json!({"matchExpressions": [{"key": label, "operator": "Exists"}]});
            spec["matchConstraints"]["objectSelector"] = labelled;
        }
        if let Some(expression) = &self.who {
            spec["matchConditions"] = json!([{"name": "who", "expression": expression}]);
        }
        if !self.variables.is_empty() {
            spec["variables"] = self.variables.into();
        }
        if let Some(kind) = self.parameters {
            spec["paramKind"] = json!({"apiVersion": format!("{GROUP}/v1alpha1"), "kind": kind});
        }
        let mut binding = json!({"policyName": self.name, "validationActions": ["Deny"]});
        if let Some(parameters) = parameters {
            binding["paramRef"] = parameters;
        }
        let metadata = json!({"name": self.name});
        vec![
            json!({"apiVersion": version, "kind": "ValidatingAdmissionPolicy", "metadata": metadata, "spec": spec}),
            json!({"apiVersion": version, "kind": "ValidatingAdmissionPolicyBinding", "metadata": metadata,
                "spec": binding}),
        ]
    }
}
