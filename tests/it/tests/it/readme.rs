//! The README names the tests that prove what it says; it must not outlive them.

use std::fs;
use std::path::Path;

#[test]
fn every_test_that_the_readme_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    let mut named = 0;
    for piece in readme.split("[`").skip(1) {
        let Some((name, rest)) = piece.split_once("`](") else { continue };
        let Some((path, _)) = rest.split_once(')') else { continue };
        let text = fs::read_to_string(root.join(path));
        let text = text.unwrap_or_else(|error| panic!("{path}: {error}"));
        if path.ends_with(".rs") {
            assert!(text.contains(&format!("fn {name}(")), "{name} is not in {path}");
            named += 1;
        }
    }
    assert!(named > 20, "only {named} tests are named");
}
