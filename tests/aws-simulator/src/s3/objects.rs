//! The stored objects. They live as long as the simulation.

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::sigv4;

/// One object; replaced as a whole.
pub(crate) struct Object {
    pub(crate) body: Vec<u8>,
    pub(crate) kind: String,
    /// Quoted, as the header carries it. Not an MD5: nobody may rely on that.
    pub(crate) etag: String,
    pub(crate) modified: Timestamp,
}

/// All objects, by bucket and key.
#[derive(Default)]
pub(crate) struct Objects {
    by_bucket: BTreeMap<String, BTreeMap<String, Object>>,
}

impl Object {
    pub(crate) fn new(body: Vec<u8>, kind: &str, modified: Timestamp) -> Self {
        let etag = format!("\"{}\"", &sigv4::sha256_hex(&body)[..32]);
        Self { body, kind: kind.to_owned(), etag, modified }
    }
}

impl Objects {
    pub(crate) fn fetch(&self, bucket: &str, key: &str) -> Option<&Object> {
        self.by_bucket.get(bucket)?.get(key)
    }

    pub(crate) fn put(&mut self, bucket: &str, key: &str, object: Object) {
        self.by_bucket.entry(bucket.to_owned()).or_default().insert(key.to_owned(), object);
    }

    pub(crate) fn delete(&mut self, bucket: &str, key: &str) {
        if let Some(objects) = self.by_bucket.get_mut(bucket) {
            objects.remove(key);
        }
    }

    pub(crate) fn list(
        &self,
        bucket: &str,
        prefix: &str,
    ) -> impl Iterator<Item = (&String, &Object)> {
        self.by_bucket
            .get(bucket)
            .into_iter()
            .flatten()
            .filter(move |(key, _)| key.starts_with(prefix))
    }
}
