//! Least privilege as objects: what operator, agents and users may do. Pure: `generate` writes them to `deploy/`.
//!
//! RBAC says which verbs on which kinds. It cannot say "of its own node", so ValidatingAdmissionPolicies do: they
//! compare the node that an agent's token is bound to with the node that an object is bound to. Admission does not
//! see reads: every agent can read all objects of our kinds, and no Secret.

mod policies;
mod roles;

use serde_json::Value;

/// The ServiceAccount of the operator.
pub const OPERATOR_ACCOUNT: &str = "virtmark-operator";

/// The ServiceAccount of the agents.
pub const AGENT_ACCOUNT: &str = "virtmark-agent";

/// Everything, by the file of `deploy/` that it goes into, for operator and agents in `namespace`.
pub fn manifests(namespace: &str) -> Vec<(&'static str, Vec<Value>)> {
    vec![
        ("operator-rbac", roles::operator(namespace)),
        ("agent-rbac", roles::agent(namespace)),
        ("user-rbac", roles::users()),
        ("policies", policies::all(namespace)),
    ]
}

/// The user that all agents are, for those in `namespace`.
pub fn agent_user(namespace: &str) -> String {
    user(namespace, AGENT_ACCOUNT)
}

/// The name by which the API server knows a ServiceAccount.
fn user(namespace: &str, account: &str) -> String {
    format!("system:serviceaccount:{namespace}:{account}")
}
