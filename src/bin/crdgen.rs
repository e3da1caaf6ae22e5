fn main() {
    for c in virtmark::api::crds() {
        println!("---\n{}", serde_saphyr::to_string(&c).unwrap_or_default());
    }
}
