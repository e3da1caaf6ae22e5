//! A disk's work in a file, so that memory does not grow with the disk, and a download that was cut has the same work. It
//! never decides what the work is.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};

use super::exit::Failure;
use super::plan::{Action, Piece};

/// Bytes of a piece in the file: start, end, what is done.
const RECORD: usize = 17;

/// A list that is being written.
pub struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Writer {
    /// Begins the list of `path`, beside it: it is there once it is whole.
    ///
    /// # Errors
    /// The kernel's.
    pub fn create(path: &Path) -> Result<Self, Failure> {
        let beside = beside(path);
        let file = File::create(&beside).map_err(Failure::file(&beside))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::new(file) })
    }

    /// Adds a piece.
    ///
    /// # Errors
    /// The kernel's.
    pub fn push(&mut self, piece: &Piece) -> Result<(), Failure> {
        let mut record = [0; RECORD];
        record[..8].copy_from_slice(&piece.start.to_le_bytes());
        record[8..16].copy_from_slice(&piece.end.to_le_bytes());
        record[16] = u8::from(piece.action == Action::Zero);
        self.file.write_all(&record).map_err(Failure::file(&self.path))
    }

    /// The list is whole.
    ///
    /// # Errors
    /// The kernel's.
    pub fn finish(self) -> Result<(), Failure> {
        let failed = |error: std::io::Error| Failure::file(&self.path)(error);
        let file = self.file.into_inner().map_err(|error| failed(error.into_error()))?;
        file.sync_all().map_err(failed)?;
        std::fs::rename(beside(&self.path), &self.path).map_err(failed)
    }
}

fn beside(path: &Path) -> PathBuf {
    path.with_extension("new")
}

/// A list that is read, one piece at a time.
pub struct Reader {
    path: PathBuf,
    file: BufReader<File>,
}

impl Reader {
    /// Opens a list that is whole.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open(path: &Path) -> Result<Self, Failure> {
        let file = File::open(path).map_err(Failure::file(path))?;
        Ok(Self { path: path.to_owned(), file: BufReader::new(file) })
    }

    /// The next piece; `None` at the end.
    ///
    /// # Errors
    /// The kernel's, and when the list is cut off.
    pub fn piece(&mut self) -> Result<Option<Piece>, Failure> {
        let mut record = [0; RECORD];
        let mut have = 0;
        while have < RECORD {
            match self.file.read(&mut record[have..]).map_err(Failure::file(&self.path))? {
                0 if have == 0 => return Ok(None),
                0 => return Err(Failure::Damaged(format!("{} is cut off", self.path.display()))),
                read => have += read,
            }
        }
        let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| record[at + byte]));
        let action = if record[16] == 0 { Action::Read } else { Action::Zero };
        Ok(Some(Piece { start: number(0), end: number(8), action }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_a_cut_is_seen() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vda.work");
        let pieces = [
            Piece { start: 0, end: 1 << 40, action: Action::Read },
            Piece { start: u64::MAX - 1, end: u64::MAX, action: Action::Zero },
        ];
        let mut writer = Writer::create(&path).unwrap();
        pieces.iter().for_each(|piece| writer.push(piece).unwrap());
        assert!(!path.exists(), "not before it is whole");
        writer.finish().unwrap();
        let mut reader = Reader::open(&path).unwrap();
        for piece in &pieces {
            assert_eq!(reader.piece().unwrap().as_ref(), Some(piece));
        }
        assert_eq!(reader.piece().unwrap(), None);
        let file = File::options().write(true).open(&path).unwrap();
        file.set_len(20).unwrap();
        let mut reader = Reader::open(&path).unwrap();
        assert!(reader.piece().is_ok() && matches!(reader.piece(), Err(Failure::Damaged(_))));
    }
}
