//! The stock ovirt-imageio client, as a backup product calls it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::kubectl;

const DOWNLOAD: &str = "
import base64, json, subprocess, sys, tempfile
from ovirt_imageio import client
namespace, transfer, image, over, base = sys.argv[1:]
more = dict(incremental=True, backing_file=base, backing_format='qcow2') if base else {}
get = lambda *what: json.loads(subprocess.check_output(['kubectl', '-n', namespace, 'get', *what, '-o', 'json']))
name = get('imagetransfer', transfer)['status']['ticketSecret']
secret = {key: base64.b64decode(value).decode() for key, value in get('secret', name)['data'].items()}
url = secret['url'].replace('127.0.0.2', '127.0.0.1') if over == 'unix' else secret['url']
with tempfile.NamedTemporaryFile('w') as ca:
    ca.write(secret['ca.crt']); ca.flush()
    client.download(url, image, ca.name, fmt='qcow2', max_workers=4, **more)
";

/// The Python that has the client.
///
/// # Errors
/// When `VIRTMARK_PYTHON` does not name it.
pub fn python() -> Result<String> {
    std::env::var("VIRTMARK_PYTHON").context("VIRTMARK_PYTHON is not set: run it with make")
}

/// Reads a transfer into a qcow2 image with `python`, a command that runs it where the servers are. It takes HTTPS; over
/// `unix` a server of the bed's is found to be local, and its unix socket taken. With `base`, an image beside it, what
/// changed is put over that.
///
/// # Errors
/// When the client fails; it has said why.
pub fn download(
    mut python: Command,
    kubeconfig: &Path,
    (namespace, transfer): (&str, &str),
    image: &Path,
    over: &str,
    base: Option<&str>,
) -> Result<()> {
    python.env("KUBECONFIG", kubeconfig).env("PATH", kubectl::search_path()?);
    python.args(["-c", DOWNLOAD, namespace, transfer]).arg(image).args([over, base.unwrap_or_default()]);
    if !python.status()?.success() {
        bail!("the stock client failed to read {transfer}");
    }
    Ok(())
}
