//! Writes what is made from the Rust code: `crds/`, `deploy/`, their like in `charts/`, the tables and the schema in `docs/`; with
//! `--check` only says what differs.

use std::process::ExitCode;
use std::{env, fs};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::Value;
use serde_saphyr::SerializerOptions;
use virtmark::{access, api, chart, client, tables};

/// In what the image server differs from ovirt-imageio on purpose.
const DIFFERENCES: &str = "tests/conformance/differences.yaml";

const MARK: &str = "# made by `cargo run --bin generate`\n";

/// The same in a template, which does not print it.
const TEMPLATE_MARK: &str = "{{- /* made by `cargo run --bin generate` */}}\n";

/// Where the chart's templates are.
const TEMPLATES: &str = "charts/virtmark/templates";

/// Where operator and agents live.
const NAMESPACE: &str = "virtmark-system";

fn main() -> anyhow::Result<ExitCode> {
    let mut made = Vec::new();
    for crd in api::crds() {
        let (name, text) = (format!("{}.yaml", crd.spec.names.plural), yaml(&crd)?);
        made.push((format!("{TEMPLATES}/crds/{name}"), format!("{TEMPLATE_MARK}{}", chart::kind(&text))));
        made.push((format!("crds/{name}"), format!("{MARK}{text}")));
    }
    for (name, objects) in access::manifests(NAMESPACE) {
        let documents = objects.iter().map(yaml).collect::<anyhow::Result<Vec<_>>>()?;
        made.push((format!("deploy/{name}.yaml"), format!("{MARK}{}", documents.join("---\n"))));
    }
    for (name, objects) in access::manifests(chart::NAMESPACE) {
        let template = |object: &Value| {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            Ok(chart::access(name, &yaml(object)?))
        };
        let documents = objects.iter().map(template).collect::<anyhow::Result<Vec<_>>>()?;
        let text = format!("{TEMPLATE_MARK}{}", documents.join("---\n"));
        made.push((format!("{TEMPLATES}/access/{name}.yaml"), text));
    }
    let differences = fs::read_to_string(DIFFERENCES).with_context(|| format!("{DIFFERENCES} is missing"))?;
    let conformance = ("conformance", tables::conformance(&differences).context(DIFFERENCES)?);
    for (name, table) in tables::all().into_iter().chain([conformance]) {
        let path = format!("docs/{name}.md");
        let page = fs::read_to_string(&path).with_context(|| format!("{path} is missing"))?;
        let page =
            tables::put(&page, &table).with_context(|| format!("{path} has no place for its table"))?;
        made.push((path, page));
    }

    let schema = format!("{}\n", serde_json::to_string_pretty(&client::manifest::schema())?);
    made.push(("docs/restore-point.schema.json".to_owned(), schema));

    let check = env::args().any(|argument| argument == "--check");
    let mut differ = false;
    for (path, text) in made {
        if fs::read_to_string(&path).is_ok_and(|old| old == text) {
            continue;
        }
        if check {
            eprintln!("{path} is not what the code says: run `cargo run --bin generate`");
            differ = true;
        } else {
            fs::write(&path, text)?;
        }
    }
    Ok(if differ { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn yaml(object: &impl Serialize) -> anyhow::Result<String> {
    let mut plain = SerializerOptions::default();
    plain.prefer_block_scalars = false;
    let mut text = String::new();
    serde_saphyr::to_fmt_writer_with_options(&mut text, object, plain)?;
    Ok(text)
}
