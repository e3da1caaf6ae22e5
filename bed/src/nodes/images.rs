//! Container images, built without a registry and without a daemon: what Debian's packages give is the base, kept in the
//! cache; the Dockerfile puts the binaries on it that cargo built outside.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use super::config::PAUSE;
use crate::cache;
use crate::vm::run;

/// Where the images are published, and the chart looks for them.
pub const REGISTRY: &str = "ghcr.io/virtmark";
const SUITE: &str = "bookworm";
const MIRROR: &str = "http://deb.debian.org/debian";
/// What the agent calls and links to, from backports.
const AGENT: [&str; 2] = ["libvirt0", "qemu-utils"];
/// What a Rust program needs of a system.
const OPERATOR: [&str; 3] = ["base-files", "libc6", "libgcc-s1"];
/// What no container reads; the licences (`doc/*/copyright`) stay.
const UNREAD: [&str; 8] = [
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "var/cache/apt",
    "var/cache/debconf",
    "var/lib/apt/lists",
    "var/log",
];

/// An image that was built.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    /// Its name, with the tag.
    pub name: String,
    /// An OCI archive with it.
    pub archive: PathBuf,
    /// Bytes of its layers as they are sent, compressed.
    pub bytes: u64,
}

/// The folder with the archives of the bases, `operator.tar` and `agent.tar`, and of the pause image; made with
/// debootstrap the first time (about two minutes).
///
/// # Errors
/// When a package cannot be had, or a tool fails.
pub fn bases() -> Result<PathBuf> {
    let made_from = [&[SUITE, MIRROR, PAUSE, "1"], AGENT.as_slice(), &OPERATOR, &UNREAD].concat();
    cache::keyed("images", &made_from, |dir| {
        eprintln!("building base images of Debian packages, once on this machine: about two minutes");
        let root = dir.join("agent");
        run(Command::new("debootstrap").args(["--variant=minbase", SUITE]).arg(&root).arg(MIRROR))?;
        let within = |words: &[&str]| {
            let mut command = Command::new("chroot");
            run(command.arg(&root).args(words).env("DEBIAN_FRONTEND", "noninteractive"))
        };
        let backports = format!("deb {MIRROR} {SUITE}-backports main\n");
        fs::write(root.join("etc/apt/sources.list.d/backports.list"), backports)?;
        within(&["apt-get", "-q", "update"])?;
        let install = ["apt-get", "-qy", "--no-install-recommends", "-t", "bookworm-backports", "install"];
        within(&[&install[..], &AGENT].concat())?;
        // the operator's has no shell and no package manager: files of a few packages, and no more
        within(
            &[
                &[
                    "apt-get",
                    "-q",
                    "-o",
                    "Dir::Cache::archives=/tmp",
                    "--download-only",
                    "--reinstall",
                    "-y",
                    "install",
                ][..],
                &OPERATOR,
            ]
            .concat(),
        )?;
        let small = dir.join("operator");
        fs::create_dir_all(&small)?;
        for entry in fs::read_dir(root.join("tmp"))? {
            let path = entry?.path();
            if path.extension().is_some_and(|end| end == "deb") {
                run(Command::new("dpkg-deb").arg("--extract").arg(&path).arg(&small))?;
                fs::remove_file(path)?;
            }
        }
        let _ = fs::remove_dir_all(root.join("tmp/partial"));
        fs::write(
            small.join("etc/passwd"),
            "root:x:0:0::/root:/sbin/nologin\nnonroot:x:65532:65532::/:/sbin/nologin\n",
        )?;
        pause(&dir.join("pause"))?;
        let store = Store { dir: dir.join("store") };
        for name in ["agent", "operator", "pause"] {
            store.base(name, &dir.join(name), &dir.join(format!("{name}.tar")))?;
            fs::remove_dir_all(dir.join(name))?;
        }
        store.remove()
    })
}

/// A file system with a program that waits for ever, and reaps nothing: no pod here shares its PID namespace.
fn pause(root: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    let source = root.join("pause.c");
    fs::write(&source, "#include <unistd.h>\nint main(void) { for (;;) pause(); }\n")?;
    run(Command::new("gcc").args(["-static", "-Os", "-s", "-o"]).arg(root.join("pause")).arg(&source))?;
    Ok(fs::remove_file(source)?)
}

/// Builds operator and agent with the repository's Dockerfile from the binaries in `binaries`, as
/// `REGISTRY/operator:VERSION` and `REGISTRY/agent:VERSION`; archives are put into `dir`. The same binaries give the same
/// images.
///
/// # Errors
/// When a binary is missing, or buildah fails: with its words.
pub fn build(
    repository: &Path,
    binaries: &[(&str, PathBuf)],
    registry: &str,
    version: &str,
    dir: &Path,
) -> Result<Vec<Image>> {
    let bases = bases()?;
    let context = dir.join("context");
    fs::create_dir_all(&context)?;
    fs::copy(repository.join("LICENSE"), context.join("LICENSE"))?;
    for (name, binary) in binaries {
        let copy = context.join(name);
        fs::copy(binary, &copy)
            .with_context(|| format!("{} is missing: run `make e2e`", binary.display()))?;
        run(Command::new("strip").arg(&copy))?;
    }
    let store = Store { dir: dir.join("store") };
    let mut images = Vec::new();
    for (name, _) in binaries {
        let base = store.pull(&bases.join(format!("{name}.tar")))?;
        let image = format!("{registry}/{name}:{version}");
        let mut build = store.command("build");
        build.args(["--target", name, "--tag", &image, "--timestamp", "0", "--identity-label=false"]);
        let base = format!("{}_BASE={base}", name.to_uppercase());
        for argument in ["BINARIES=prebuilt", &base, &format!("VERSION={version}")] {
            build.args(["--build-arg", argument]);
        }
        run(build.arg("--file").arg(repository.join("Dockerfile")).arg(&context))?;
        let archive = dir.join(format!("{name}.tar"));
        store.push(&image, &archive)?;
        images.push(Image { name: image, bytes: fs::metadata(&archive)?.len(), archive });
    }
    store.remove()?;
    fs::remove_dir_all(context)?;
    Ok(images)
}

/// Where buildah keeps what it works on.
struct Store {
    dir: PathBuf,
}

impl Store {
    fn command(&self, verb: &str) -> Command {
        let mut command = Command::new("buildah");
        command.env("BUILDAH_ISOLATION", "chroot").arg("--root").arg(self.dir.join("root"));
        command.arg("--runroot").arg(self.dir.join("run")).args(["--storage-driver", "vfs", verb]);
        command
    }

    /// Makes an image of a folder; a program `/pause` in it is what it runs.
    fn base(&self, name: &str, root: &Path, archive: &Path) -> Result<()> {
        for unread in UNREAD {
            let folder = root.join(unread);
            if folder.exists() {
                fs::remove_dir_all(&folder)?;
                fs::create_dir(folder)?;
            }
        }
        for file in fs::read_dir(root.join("usr/share/doc")).into_iter().flatten().filter_map(Result::ok) {
            only_copyright(&file.path())?;
        }
        fs::set_permissions(root, fs::Permissions::from_mode(0o755))?;
        let context = self.dir.join(name);
        fs::create_dir_all(&context)?;
        let tar = context.join("root.tar");
        let fixed = ["--sort=name", "--mtime=@0", "--numeric-owner", "--create", "--file"];
        run(Command::new("tar").args(fixed).arg(&tar).arg("--directory").arg(root).arg("."))?;
        let entry = if root.join("pause").exists() { "ENTRYPOINT [\"/pause\"]\n" } else { "" };
        fs::write(context.join("Dockerfile"), format!("FROM scratch\nADD root.tar /\n{entry}"))?;
        let image = if name == "pause" { PAUSE.to_owned() } else { format!("virtmark.dev/bed/{name}:1") };
        let mut build = self.command("build");
        build.args(["--tag", &image, "--timestamp", "0", "--identity-label=false"]);
        run(build.arg(&context))?;
        self.push(&image, archive)
    }

    /// Takes an archive in, and answers the image's id.
    fn pull(&self, archive: &Path) -> Result<String> {
        let output =
            self.command("pull").arg("-q").arg(format!("oci-archive:{}", archive.display())).output()?;
        if !output.status.success() {
            bail!("buildah pull: {}", String::from_utf8_lossy(&output.stderr).trim());
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    fn push(&self, image: &str, archive: &Path) -> Result<()> {
        let to = format!("oci-archive:{}:{image}", archive.display());
        run(self.command("push").args(["-q", image, &to]))
    }

    fn remove(self) -> Result<()> {
        Ok(fs::remove_dir_all(self.dir)?)
    }
}

/// Leaves of a package's documents what its licence wants to go along.
fn only_copyright(folder: &Path) -> Result<()> {
    if !folder.is_dir() {
        return Ok(());
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() {
            fs::remove_dir_all(path)?;
        } else if path.file_name().is_some_and(|name| name != "copyright") {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}
