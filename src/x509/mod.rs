//! X.509 as the agents and the operator speak it: requests, a CA and what it signs, and how one CA follows another.
//!
//! Text in, text out: nothing here talks to an API server, reads a file or a clock. What is random is keys. It knows neither
//! Kubernetes nor who may have which name.
//!
//! ```text
//!   agent: key, request -> operator: parsed, decided elsewhere -> authority signs -> agent: trusted by the bundle?
//! ```

pub mod authority;
pub mod certificate;
pub mod request;
pub mod succession;

pub use authority::Authority;
pub use certificate::Span;
pub use request::Request;

/// Why something of X.509 cannot be used, or made.
#[derive(Debug, thiserror::Error)]
pub enum X509Error {
    /// No certificate in the text, or none that can be read.
    #[error("no certificate in PEM form")]
    NoCertificate,
    /// The key is not the certificate's.
    #[error("the key is not the certificate's")]
    OtherKey,
    /// A time that no certificate can have.
    #[error("a time that no certificate can have")]
    Time,
    /// A name, a key or a certificate that cannot be used or made.
    #[error("keys or certificates: {0}")]
    Made(#[from] rcgen::Error),
    /// A client would not take the certificate.
    #[error("a client would not take the certificate: {0}")]
    NotTrusted(String),
}
