//! Shared pieces of the CRD schemas. Never used outside `api`.

/// A disk's target in the domain, `vda`: libvirt's `<target dev=…>`.
pub(super) const TARGET: &str = r"^[A-Za-z0-9_.-]{1,64}$";

/// Whether `text` is a disk's target as `TARGET` has it.
pub fn is_disk_target(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    (1..=64).contains(&text.len()) && text.bytes().all(fits)
}

/// The name of a libvirt pool or volume that we take: it is a file's name, and nothing that a shell or a path reads otherwise.
pub(super) const VOLUME: &str = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,127}$";

/// Whether `text` is the name of a volume as `VOLUME` has it.
pub fn is_volume_name(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let starts = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    starts && text.len() <= 128 && text.bytes().all(fits)
}

/// The name of an object in the same namespace (RFC 1123 subdomain).
pub(super) const OBJECT_NAME: &str = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$";

/// A uuid as libvirt prints it.
pub(super) const UUID: &str = r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$";
