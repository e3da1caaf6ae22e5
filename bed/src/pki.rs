//! Certificates of one bed: a CA, those that it signs, and the service accounts' key.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use serde_json::json;

/// A CA, and where the files are.
pub struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    /// Makes the CA in `dir`, and what an API server at `address` needs: `ca.crt`, `apiserver.{crt,key}`,
    /// `admin.{crt,key}`, `accounts.{key,pub}`.
    ///
    /// # Errors
    /// When keys cannot be made or files not be written.
    pub fn make(dir: &Path, address: &str) -> Result<Self> {
        fs::create_dir_all(dir)?;
        let ca_key = KeyPair::generate()?;
        let mut ca = CertificateParams::default();
        ca.distinguished_name.push(DnType::CommonName, "virtmark bed");
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        fs::write(dir.join("ca.crt"), ca.self_signed(&ca_key)?.pem())?;
        let pki = Self { dir: dir.to_owned(), issuer: Issuer::new(ca, ca_key) };

        let service = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "10.96.0.1"];
        pki.server("apiserver", "kube-apiserver", &[&[address, "localhost"], service.as_slice()].concat())?;
        pki.client("admin", "bed-admin", Some("system:masters"))?;
        let accounts = KeyPair::generate()?;
        fs::write(pki.path("accounts.key"), accounts.serialize_pem())?;
        fs::write(pki.path("accounts.pub"), accounts.public_key_pem())?;
        Ok(pki)
    }

    /// A server's certificate for these names and addresses, in `FILE.{crt,key}`.
    ///
    /// # Errors
    /// When a name is none, or files cannot be written.
    pub fn server(&self, file: &str, name: &str, addresses: &[&str]) -> Result<()> {
        let addresses: Vec<_> = addresses.iter().map(|&address| address.to_owned()).collect();
        let mut params = CertificateParams::new(addresses)?;
        params.distinguished_name.push(DnType::CommonName, name);
        self.sign(file, params, ExtendedKeyUsagePurpose::ServerAuth)
    }

    /// The certificate of the user `name` in `group`, in `FILE.{crt,key}`.
    ///
    /// # Errors
    /// When files cannot be written.
    pub fn client(&self, file: &str, name: &str, group: Option<&str>) -> Result<()> {
        let mut params = CertificateParams::default();
        if let Some(group) = group {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        params.distinguished_name.push(DnType::CommonName, name);
        self.sign(file, params, ExtendedKeyUsagePurpose::ClientAuth)
    }

    fn sign(&self, name: &str, mut params: CertificateParams, usage: ExtendedKeyUsagePurpose) -> Result<()> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        let key = KeyPair::generate()?;
        fs::write(self.path(&format!("{name}.crt")), params.signed_by(&key, &self.issuer)?.pem())?;
        fs::write(self.path(&format!("{name}.key")), key.serialize_pem())?;
        Ok(())
    }

    /// The path of one of the files.
    pub fn path(&self, file: &str) -> PathBuf {
        self.dir.join(file)
    }

    /// The user of `FILE.{crt,key}`, as a kubeconfig has it.
    pub fn user(&self, file: &str) -> serde_json::Value {
        let path = |end: &str| self.path(&format!("{file}.{end}")).to_string_lossy().into_owned();
        json!({"client-certificate": path("crt"), "client-key": path("key")})
    }
}
