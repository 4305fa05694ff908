//! Environment variables that no user may set for terraform: they would change whose credentials,
//! which state or which terraform a job uses.
//!
//! The control plane refuses them when they are saved, the runner drops them when a job starts:
//! one table, so that what is accepted is also delivered.

const NAMES: &[&str] = &[
    "AWS_ACCESS_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_CA_BUNDLE",
    "AWS_CONFIG_FILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_METADATA_URL",
    "AWS_PROFILE",
    "AWS_SDK_LOAD_CONFIG",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SECRET_KEY",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "HOME",
    "PATH",
    "TF_DATA_DIR",
    "TF_IN_AUTOMATION",
    "TF_INPUT",
    "TF_REATTACH_PROVIDERS",
    "TF_WORKSPACE",
    "TMPDIR",
];

const PREFIXES: &[&str] = &[
    "AWS_CONTAINER_",
    "AWS_CREDENTIAL_",
    "AWS_EC2_METADATA_",
    "AWS_ENDPOINT_URL",
    "AWS_LOGIN_",
    "AWS_MFA_",
    "AWS_ROLE_",
    "LATCHKEY_",
    "LD_",
    "TF_CLI_",
    "TF_HTTP_",
    "TF_LOG",
];

/// Tells whether users may not set this environment variable.
pub fn is_reserved(name: &str) -> bool {
    let name = name.to_ascii_uppercase();
    // `AWS_S3_ENDPOINT` and its like are read by terraform's S3 backend.
    let endpoint = name.starts_with("AWS_") && name.ends_with("_ENDPOINT");
    NAMES.contains(&name.as_str())
        || PREFIXES.iter().any(|prefix| name.starts_with(prefix))
        || endpoint
}

#[cfg(test)]
mod tests {
    use super::is_reserved;

    #[test]
    fn reserved_names_are_exactly_these() {
        for (name, reserved) in [
            ("AWS_ACCESS_KEY_ID", true),
            ("AWS_SECRET_ACCESS_KEY", true),
            ("AWS_SESSION_TOKEN", true),
            ("AWS_PROFILE", true),
            ("aws_profile", true),
            ("AWS_CONFIG_FILE", true),
            ("AWS_ROLE_ARN", true),
            ("AWS_ENDPOINT_URL", true),
            ("AWS_ENDPOINT_URL_STS", true),
            ("AWS_S3_ENDPOINT", true),
            ("AWS_CONTAINER_CREDENTIALS_FULL_URI", true),
            ("AWS_WEB_IDENTITY_TOKEN_FILE", true),
            ("TF_HTTP_ADDRESS", true),
            ("TF_CLI_ARGS_apply", true),
            ("TF_CLI_CONFIG_FILE", true),
            ("TF_DATA_DIR", true),
            ("TF_WORKSPACE", true),
            ("TF_REATTACH_PROVIDERS", true),
            ("TF_LOG", true),
            ("TF_LOG_PATH", true),
            ("LD_PRELOAD", true),
            ("PATH", true),
            ("HOME", true),
            ("AWS_REGION", false),
            ("AWS_DEFAULT_REGION", false),
            ("AWS_MAX_ATTEMPTS", false),
            ("TF_VAR_name", false),
            ("TF_STATE_PERSIST_INTERVAL", false),
            ("GITHUB_TOKEN", false),
            ("PATH_TO_X", false),
        ] {
            assert_eq!(is_reserved(name), reserved, "{name}");
        }
    }
}
