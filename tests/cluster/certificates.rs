//! Certificates that the operator signs: who gets one, for what, and that a client needs nothing but the published bundle.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use base64ct::{Base64, Encoding as _};
use rcgen::KeyPair;
use serde_json::{Value, json};
use virtmark::clock;
use virtmark::x509::Request;
use virtmark::x509::certificate::check;
use virtmark_bed::component::{ADVERTISED, SIGNED_NODE, SYSTEM_NAMESPACE, account};
use virtmark_bed::kubectl::Kubectl;
use virtmark_bed::{Bed, wait_until};

use super::rig::{BOUND, MIB, Rig, merge, small};

/// The certificates of those that sign, as everybody may read them.
fn published(bed: &Bed) -> Result<String> {
    let map = bed.kubectl().json(&["-n", SYSTEM_NAMESPACE, "get", "configmap", "virtmark-ca"])?;
    Ok(map["data"]["ca.crt"].as_str().context("no ca.crt")?.to_owned())
}

#[test]
fn a_client_needs_only_the_published_bundle() -> Result<()> {
    let rig = Rig::running_on(1, "certified", small())?;
    ensure!(rig.vm.hypervisor().name == SIGNED_NODE);
    rig.vm.write("vda", 0, MIB, 0x11)?;
    rig.backup("certified-1", json!({}))?;
    let mut ticket = rig.ticket("certified-1-vda")?;
    ensure!(fs::read_to_string(&ticket.ca)? == published(&rig.bed)?, "the ticket names the same CAs");
    ticket.ca = rig.files.path().join("bundle.pem");
    fs::write(&ticket.ca, published(&rig.bed)?)?;
    let image = rig.files.path().join("image.raw");
    ensure!(ticket.curl(&["-o", &image.to_string_lossy()])? == "200");
    virtmark_bed::compare(&rig.vm.remember("vda")?, &image, "raw")?;
    let named = ticket.url.replace(ADVERTISED, "localhost");
    ensure!(ticket.curl_at(&named, &["-H", "Range: bytes=0-0"])? == "206", "by its name, too");
    rig.state("vmbackup", "certified-1", "Finalized")?;
    rig.phase("vmbackup", "certified-1", "Succeeded").map(drop)
}

/// Requests of one test, removed when it ends.
struct Requests<'a> {
    bed: &'a Bed,
    made: Vec<String>,
}

impl Drop for Requests<'_> {
    fn drop(&mut self) {
        for name in &self.made {
            // a test that failed says why already
            let _ = self.bed.kubectl().run(&["delete", "csr", name, "--ignore-not-found"]);
        }
    }
}

impl Requests<'_> {
    /// Makes one as `kubectl`'s user; `edit` changes its spec.
    fn ask(
        &mut self,
        kubectl: &Kubectl,
        (subject, names, addresses): (&str, &[&str], &[&str]),
        edit: Value,
    ) -> Result<String> {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let addresses = addresses.iter().map(|address| address.parse()).collect::<Result<Vec<_>, _>>()?;
        let pem = Request::make(&KeyPair::generate()?, subject, &names, &addresses)?;
        let mut spec = json!({"signerName": "virtmark.dev/agent", "usages": ["digital signature", "server auth"],
            "request": Base64::encode_string(pem.as_bytes())});
        merge(&mut spec, edit);
        let name = format!("test-{}-{}", std::process::id(), self.made.len());
        let object = json!({"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
            "metadata": {"name": name}, "spec": spec});
        kubectl.run_with(&["create", "-f", "-"], &object.to_string())?;
        self.made.push(name.clone());
        Ok(name)
    }

    fn status(&self, name: &str) -> Result<Value> {
        Ok(self.bed.kubectl().json(&["get", "csr", name])?["status"].clone())
    }

    /// The reason of the condition that ends it, and its certificate in PEM, if it has one.
    fn answer(&self, name: &str) -> Result<(String, Option<String>)> {
        wait_until(BOUND, &format!("an answer to {name}"), || {
            let status = self.status(name)?;
            let Some(condition) = status["conditions"].get(0) else { return Ok(None) };
            let reason = condition["reason"].as_str().unwrap_or_default().to_owned();
            match (condition["type"].as_str(), status["certificate"].as_str()) {
                (Some("Approved"), None) => Ok(None),
                (_, None) => Ok(Some((reason, None))),
                (_, Some(text)) => {
                    let bytes = Base64::decode_vec(text).map_err(|error| anyhow::anyhow!("{error}"))?;
                    Ok(Some((reason, Some(String::from_utf8(bytes)?))))
                }
            }
        })
    }
}

#[test]
fn an_agent_gets_a_certificate_of_its_node_and_nobody_gets_another() -> Result<()> {
    let bed = Bed::from_env()?;
    let mut requests = Requests { bed: &bed, made: Vec::new() };
    let token = |of: &str, node: Option<&str>| -> Result<Kubectl> {
        let file = format!("{of}-{}-certificates", node.unwrap_or("unbound"));
        Ok(Kubectl::new(&account(&bed.dir, &bed.plane, of, &file, node)?, None))
    };
    let agent = token("virtmark-agent", Some("node-a"))?;
    let own = ("virtmark-agent:node-a", &["node-a", "localhost"][..], &["127.0.0.1", ADVERTISED][..]);

    // somebody else's, which nobody answers here
    let others = requests.ask(&bed.kubectl(), own, json!({"signerName": "example.com/other"}))?;
    let (reason, certificate) = {
        let name = requests.ask(&agent, own, json!({"expirationSeconds": 86_400}))?;
        requests.answer(&name)?
    };
    ensure!(reason == "Fits", "{reason}");
    let (certificate, bundle) = (certificate.context("no certificate")?, published(&bed)?);
    for host in ["node-a", "localhost", "127.0.0.1", ADVERTISED] {
        check(&bundle, &certificate, host, clock::now()).with_context(|| host.to_owned())?;
    }
    ensure!(check(&bundle, &certificate, "node-b", clock::now()).is_err());

    let hostile = [
        (
            "node-b's",
            &agent,
            ("virtmark-agent:node-b", &["node-b"][..], &[][..]),
            json!({}),
            "SubjectNotAllowed",
        ),
        ("node-b's name", &agent, (own.0, &["node-a", "node-b"], &[]), json!({}), "NameNotAllowed"),
        ("another address", &agent, (own.0, &["node-a"], &["192.0.2.1"]), json!({}), "AddressNotAllowed"),
        (
            "a client's",
            &agent,
            own,
            json!({"usages": ["digital signature", "server auth", "client auth"]}),
            "UsagesNotAllowed",
        ),
        ("an admin's", &bed.kubectl(), own, json!({}), "NotAnAgent"),
    ];
    for (what, kubectl, asked, edit, expected) in hostile {
        let name = requests.ask(kubectl, asked, edit).context(what)?;
        let (reason, certificate) = requests.answer(&name).context(what)?;
        ensure!(reason == expected && certificate.is_none(), "{what}: {reason}");
        ensure!(requests.status(&name)?["conditions"][0]["type"] == "Denied", "{what}");
    }

    // what admission does not let through
    let unbound = token("virtmark-agent", None)?;
    let kubelets = json!({"signerName": "kubernetes.io/kube-apiserver-client"});
    for (what, kubectl, edit, why) in [
        ("an unbound token", &unbound, json!({}), "the token is not bound to a node"),
        ("another signer", &agent, kubelets, "certificates of virtmark.dev/agent only"),
        ("an operator", &token("virtmark-operator", None)?, json!({}), "forbidden"),
    ] {
        let refused = requests.ask(kubectl, own, edit);
        let words = refused.err().with_context(|| format!("{what} was let through"))?;
        ensure!(format!("{words:#}").contains(why), "{what}: {words:#}");
    }
    ensure!(requests.status(&others)?.get("conditions").is_none(), "it answers for another signer");
    authority_is_kept(&bed, &agent, &token("virtmark-operator", None)?)
}

/// Nobody reads the CA's key but the operator, which makes no other Secret.
fn authority_is_kept(bed: &Bed, agent: &Kubectl, operator: &Kubectl) -> Result<()> {
    let read = ["-n", SYSTEM_NAMESPACE, "get", "secret", "virtmark-ca", "-o", "name"];
    ensure!(agent.run(&read).is_err(), "an agent reads the CA's key");
    operator.run(&read)?;
    ensure!(!published(bed)?.contains("PRIVATE"));
    ensure!(!bed.logs().contains("PRIVATE KEY"));
    let token = json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/service-account-token",
        "metadata": {"name": "virtmark-ca-2", "namespace": SYSTEM_NAMESPACE,
            "annotations": {"kubernetes.io/service-account.name": "virtmark-agent"}}});
    let refused = operator.run_with(&["create", "-f", "-"], &token.to_string());
    let words = format!("{:#}", refused.err().context("the operator made itself a token")?);
    ensure!(words.contains("its CA only"), "{words}");
    Ok(())
}
