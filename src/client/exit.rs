//! Why a command ended, as a number for scripts and as words for people. It never prints.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::nbd::NbdError;

/// The exit codes, which `virtmark --help` and docs/client.md list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// It was done.
    Done = 0,
    /// Something here failed: a file, a program, the network.
    Failed = 1,
    /// The command line is wrong (clap's own number).
    Usage = 2,
    /// What was named is not there.
    NotFound = 3,
    /// Virtmark refused the backup, or ended it: its reason is told.
    Refused = 4,
    /// A restore point is damaged, or lacks what it lies over.
    Damaged = 5,
    /// What was waited for did not come in time.
    Late = 6,
    /// Ctrl-C or SIGTERM: the backup was cancelled.
    Interrupted = 130,
}

impl Code {
    /// All of them, for the documents.
    pub const ALL: &[(Self, &str)] = &[
        (Self::Done, "done"),
        (Self::Failed, "something failed here: a file, a program, the network; the backup was cancelled"),
        (Self::Usage, "the command line is wrong, or is not what was begun there"),
        (Self::NotFound, "the VM, the backup or the restore point that was named is not there"),
        (Self::Refused, "Virtmark refused the backup, or ended it; its reason is told"),
        (Self::Damaged, "a restore point is damaged, or lacks what it lies over"),
        (Self::Late, "what was waited for did not come in time"),
        (Self::Interrupted, "Ctrl-C or SIGTERM; the backup was cancelled"),
    ];

    /// As the operating system takes it.
    #[must_use]
    pub const fn number(self) -> u8 {
        self as u8
    }
}

/// The exit codes as `--help` shows them.
#[must_use]
pub fn table() -> String {
    let line = |(code, words): &(Code, &str)| format!("  {:>3}  {words}", code.number());
    let lines: Vec<_> = Code::ALL.iter().map(line).collect();
    format!("Exit codes:\n{}", lines.join("\n"))
}

/// Why a command did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Arguments that contradict each other, or the folder.
    #[error("{0}")]
    Usage(String),
    /// What was named is not there.
    #[error("{0}")]
    NotFound(String),
    /// The object ended, or was refused.
    #[error("{what}: {reason}: {message}")]
    Refused {
        /// The object, as kubectl names it.
        what: String,
        /// The reason of its condition.
        reason: String,
        /// Its message, which says what to do next.
        message: String,
    },
    /// The API server would not.
    #[error("the API server: {0}")]
    Api(String),
    /// Whether something was done is not known: the API server did not answer.
    #[error("it is not known whether {what} was made: {why}; look with kubectl get vmbk")]
    Unanswered {
        /// The object, as kubectl names it.
        what: String,
        /// What became of the request.
        why: String,
    },
    /// What is left of a backup was asked for otherwise.
    #[error(
        "what is left of {backup} was begun with another {option}: run that command again, or give it up with virtmark \
         backup stop --cancel {vm} {backup}"
    )]
    Unlike {
        /// The VmBackup.
        backup: String,
        /// Its VM.
        vm: String,
        /// What differs.
        option: &'static str,
    },
    /// What was read is not all of the backup.
    #[error("what is here of VmBackup {backup} is no restore point: {why}")]
    Incomplete {
        /// Its name.
        backup: String,
        /// What is not here.
        why: super::state::Incomplete,
    },
    /// Something that was read back is not what it should be.
    #[error("{0}")]
    Damaged(String),
    /// A deadline passed.
    #[error("{0}")]
    Late(String),
    /// The user wants no more.
    #[error("interrupted")]
    Interrupted,
    /// A file.
    #[error("{}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The image server's connection.
    #[error(transparent)]
    Images(#[from] super::images::ImagesError),
    /// The local qemu-nbd.
    #[error("the image that is written: {0}")]
    Nbd(#[from] NbdError),
    /// A program.
    #[error("{0}")]
    Program(String),
    /// The list of extents.
    #[error("the image server's list of extents: {0}")]
    Extents(#[from] super::extents::ExtentsError),
}

impl Failure {
    /// The number that the process ends with.
    #[must_use]
    pub fn code(&self) -> Code {
        match self {
            Self::Usage(_) | Self::Unlike { .. } => Code::Usage,
            Self::NotFound(_) => Code::NotFound,
            Self::Refused { .. } => Code::Refused,
            Self::Damaged(_) | Self::Incomplete { .. } => Code::Damaged,
            Self::Late(_) => Code::Late,
            Self::Interrupted => Code::Interrupted,
            Self::Api(_)
            | Self::Unanswered { .. }
            | Self::File { .. }
            | Self::Images(_)
            | Self::Nbd(_)
            | Self::Program(_)
            | Self::Extents(_) => Code::Failed,
        }
    }

    /// A file and what the kernel says of it.
    pub fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { path, source }
    }
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) if status.code == 403 => {
                Self::Api(format!("{}; have an admin grant it (docs/security.md)", status.message))
            }
            kube::Error::Api(status) => Self::Api(status.message.clone()),
            other => Self::Api(Chain(&other).to_string()),
        }
    }
}

/// An error with its sources, in one line.
pub struct Chain<'a>(pub &'a dyn std::error::Error);

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = self.0.to_string();
        f.write_str(&told)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            let words = error.to_string();
            // many errors repeat their source
            if !told.contains(&words) {
                write!(f, ": {words}")?;
                told.push_str(&words);
            }
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_told_once() {
        let mut numbers: Vec<_> = Code::ALL.iter().map(|(code, _)| code.number()).collect();
        numbers.dedup();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 130]);
        assert!(table().contains("  130  Ctrl-C"));
    }

    #[test]
    fn sources_are_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read: {0}")]
        struct Outer(#[source] io::Error);
        assert_eq!(Chain(&Outer(io::Error::other("no disk"))).to_string(), "cannot read: no disk");
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read")]
        struct Silent(#[source] io::Error);
        assert_eq!(Chain(&Silent(io::Error::other("no disk"))).to_string(), "cannot read: no disk");
    }
}
