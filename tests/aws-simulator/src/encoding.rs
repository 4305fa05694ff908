//! The encodings of the Query protocol: URI escapes, forms, XML text.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// What `uri_encode` leaves alone beside the unreserved characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keep {
    Nothing,
    Slash,
}

/// Escapes all but the unreserved characters, as SigV4 wants it.
pub(crate) fn uri_encode(bytes: &[u8], keep: Keep) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                text.push(char::from(*byte));
            }
            b'/' if keep == Keep::Slash => text.push('/'),
            other => write!(text, "%{other:02X}").expect("a String takes all that is written"),
        }
    }
    text
}

/// Undoes the escapes; what is not an escape stays as it is.
pub(crate) fn percent_decode(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escape = (bytes[at] == b'%').then(|| bytes.get(at + 1..at + 3)).flatten();
        let mut byte = [0];
        match escape.map(|digits| hex::decode_to_slice(digits, &mut byte)) {
            Some(Ok(())) => {
                decoded.push(byte[0]);
                at += 3;
            }
            Some(Err(_)) | None => {
                decoded.push(bytes[at]);
                at += 1;
            }
        }
    }
    decoded
}

/// Splits a query as the signer saw it: a plus sign is a plus sign.
pub(crate) fn uri_pairs(query: &str) -> Vec<(Vec<u8>, Vec<u8>)> {
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(key, value)| (percent_decode(key), percent_decode(value)))
        .collect()
}

/// The members of a request, from a form or a query. Where one occurs twice, the first counts.
#[derive(Default)]
pub(crate) struct Form {
    members: Vec<(String, String)>,
}

impl Form {
    /// Reads a form, where a plus sign is a space.
    pub(crate) fn parse(form: &str) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let members = uri_pairs(&form.replace('+', "%20"))
            .into_iter()
            .map(|(key, value)| (text(key), text(value)))
            .collect();
        Self { members }
    }

    /// Lists the members, but for those named.
    pub(crate) fn members(&self, without: &[&str]) -> BTreeMap<String, String> {
        let mut members = BTreeMap::new();
        for (key, value) in self.members.iter().filter(|(key, _)| !without.contains(&key.as_str()))
        {
            members.entry(key.clone()).or_insert_with(|| value.clone());
        }
        members
    }

    /// Finds a member; an empty one counts as given.
    pub(crate) fn value(&self, name: &str) -> Option<&str> {
        self.members.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// Lists the `Key` and `Value` of `name.member.1` and so on.
    pub(crate) fn pairs(&self, name: &str) -> Vec<(&str, &str)> {
        (1..)
            .map_while(|index| {
                let key = self.value(&format!("{name}.member.{index}.Key"))?;
                Some((key, self.value(&format!("{name}.member.{index}.Value")).unwrap_or("")))
            })
            .collect()
    }
}

/// Writes one XML element with text in it.
pub(crate) fn element(name: &str, text: &str) -> String {
    format!("<{name}>{}</{name}>", xml_text(text))
}

/// Escapes text for XML.
pub(crate) fn xml_text(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_undone_and_broken_ones_kept() {
        assert_eq!(percent_decode("env%3A%2fa%zz%"), b"env:/a%zz%");
        assert_eq!(uri_encode(b"env:/a b", Keep::Slash), "env%3A/a%20b");
        assert_eq!(uri_encode(b"env:/a", Keep::Nothing), "env%3A%2Fa");
    }

    #[test]
    fn the_first_of_two_members_counts() {
        let form = Form::parse("TokenCode=123456&TokenCode=654321&Name=a+b&Empty=");
        assert_eq!(form.value("TokenCode"), Some("123456"));
        assert_eq!(form.value("Name"), Some("a b"));
        assert_eq!(form.value("Empty"), Some(""));
        assert_eq!(form.value("Absent"), None);
    }

    #[test]
    fn lists_end_at_the_first_gap() {
        let form =
            Form::parse("T.member.1.Key=k&T.member.2.Key=l&T.member.2.Value=v&T.member.4.Key=m");
        assert_eq!(form.pairs("T"), [("k", ""), ("l", "v")]);
    }
}
