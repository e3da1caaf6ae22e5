//! What the state directory has of uploads: a file for each, with its ticket.

use super::{Folder, StateDir, StateError, checked, io_error, json, read_json};
use crate::agent::upload::Upload;

impl StateDir {
    fn uploading(&self) -> Result<Folder, StateError> {
        Folder::open(&self.uploads).map_err(io_error(&self.uploads))
    }

    /// Stores an upload.
    ///
    /// # Errors
    /// When it cannot be written: then nothing may be done on the host.
    pub fn store_upload(&self, upload: &Upload) -> Result<(), StateError> {
        let name = format!("{}.json", checked(&upload.uid)?);
        let path = self.uploads.join(&name);
        if let Some(what) = upload.unsound() {
            return Err(StateError::Foreign { path, what });
        }
        self.uploading()?.write(&name, &json(&path, upload)?).map_err(io_error(&path))
    }

    /// The upload of a transfer; `None` when nothing was stored.
    ///
    /// # Errors
    /// When it cannot be read, or be believed.
    pub fn upload(&self, uid: &str) -> Result<Option<Upload>, StateError> {
        let name = format!("{}.json", checked(uid)?);
        let Some(upload) = read_json::<Upload>(&self.uploading()?, &name)? else { return Ok(None) };
        match upload.unsound() {
            None if upload.uid == uid => Ok(Some(upload)),
            what => Err(StateError::Foreign { path: self.uploads.join(name), what: what.unwrap_or("uid") }),
        }
    }

    /// The uids of the uploads that were stored.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn uploads(&self) -> Result<Vec<String>, StateError> {
        let names = self.uploading()?.names().map_err(io_error(&self.uploads))?;
        let uids = names.iter().filter_map(|name| name.strip_suffix(".json"));
        Ok(uids.filter(|uid| checked(uid).is_ok()).map(str::to_owned).collect())
    }

    /// Forgets an upload of which nothing is on the host.
    ///
    /// # Errors
    /// When it is there and cannot be removed.
    pub fn forget_upload(&self, uid: &str) -> Result<(), StateError> {
        let name = format!("{}.json", checked(uid)?);
        self.uploading()?.remove(&name).map_err(io_error(&self.uploads.join(&name)))
    }
}
