//! What must not be in an image is left out or refused.

use crate::project::{Project, build, entries};
use std::{os::unix::fs::symlink, os::unix::net::UnixListener, path::Path};
use systemprompt_contract::token;
use systemprompt_oci::build::{BuildError, LeftOutReason, SecretKind};

fn reason(project: &Project, path: &str) -> Option<LeftOutReason> {
    project.plan().left_out.into_iter().find(|left| left.path == Path::new(path)).map(|left| left.why)
}

#[test]
fn files_that_carry_credentials_never_go_in() {
    let project = Project::new();
    for path in [
        "services/secrets.json",
        "services/deep/down/credentials.json",
        "web/dist/tenants.json",
        "web/dist/Secrets.json",
        ".systemprompt/profiles/prod/secrets.json",
    ] {
        project.write(path, "{}");
        assert_eq!(reason(&project, path), Some(LeftOutReason::Credentials), "{path}");
    }
    for path in ["services/.env", "web/dist/.env.local", "services/.envrc"] {
        project.write(path, "A=B");
        assert_eq!(reason(&project, path), Some(LeftOutReason::EnvironmentFile), "{path}");
    }
    project.write("services/.envoy/config.yaml", "x: 1");
    assert_eq!(reason(&project, "services/.envoy"), None, "only looks like one");
    project.write("services/.systemprompt/docker/shared_config.json", "{}");
    assert_eq!(reason(&project, "services/.systemprompt"), Some(LeftOutReason::State));
    project.write("services/.git/config", "x");
    assert_eq!(reason(&project, "services/.git"), Some(LeftOutReason::GitData));
    project.write(".systemprompt/profiles/prod/Dockerfile", "FROM x");
    assert_eq!(reason(&project, ".systemprompt/profiles/prod/Dockerfile"), Some(LeftOutReason::NotOfProfile));
    let paths: Vec<_> = entries(&project.build()).into_iter().map(|entry| entry.0.to_lowercase()).collect();
    for name in ["secrets.json", "credentials.json", "tenants.json", ".env", ".git/", "dockerfile"] {
        assert!(!paths.iter().any(|path| path.contains(name) && !path.contains(".envoy")), "{name}");
    }
}

#[test]
fn links_lead_to_files_of_the_project_or_nowhere() {
    let project = Project::new();
    project.write("brand/logo.svg", "<svg/>");
    project.write("services/secrets.json", "{}");
    let link = |target: &Path, at: &str| symlink(target, project.path(at)).expect("link");
    link(&project.path("brand/logo.svg"), "web/dist/logo.svg");
    link(Path::new("/etc/passwd"), "web/dist/passwd");
    link(Path::new("../../../../../../etc/passwd"), "web/dist/up");
    link(Path::new("nothing"), "web/dist/dangling");
    link(Path::new("loop"), "web/dist/loop");
    link(&project.path("brand"), "web/dist/folder");
    link(&project.path("services/secrets.json"), "web/dist/harmless.json");
    let _socket = UnixListener::bind(project.path("services/socket")).expect("socket");
    project.write("web/dist/.wh.index.html", "");
    for (path, expected) in [
        ("web/dist/passwd", LeftOutReason::LinkOutside),
        ("web/dist/up", LeftOutReason::LinkOutside),
        ("web/dist/dangling", LeftOutReason::LinkOutside),
        ("web/dist/loop", LeftOutReason::LinkOutside),
        ("web/dist/folder", LeftOutReason::LinkToDirectory),
        ("web/dist/harmless.json", LeftOutReason::Credentials),
        ("services/socket", LeftOutReason::SpecialFile),
        ("web/dist/.wh.index.html", LeftOutReason::WhiteoutName),
    ] {
        assert_eq!(reason(&project, path), Some(expected), "{path}");
    }
    let found = entries(&project.build());
    let logo = found.iter().find(|entry| entry.0 == "app/web/dist/logo.svg").expect("the linked file");
    assert_eq!(logo.2, b"<svg/>");
}

#[test]
fn a_link_brings_in_nothing_that_is_left_out_where_it_lies() {
    let project = Project::new();
    project.write(".dockerignore", "private\n!private/open.txt\n");
    project.write("private/note.txt", "x");
    project.write("private/open.txt", "x");
    project.write(".systemprompt/docker/shared_config.json", "{}");
    project.write(".systemprompt/profiles/base/profile.yaml", "name: base\n");
    let link = |target: &str, at: &str| {
        let path = project.path(at);
        std::fs::create_dir_all(path.parent().expect("below the root")).expect("folders");
        symlink(project.path(target), path).expect("link");
    };
    link("private/note.txt", "web/dist/note.txt");
    link("private/open.txt", "web/dist/open.txt");
    link(".systemprompt/docker/shared_config.json", "web/dist/config.json");
    link(".systemprompt/profiles/base/profile.yaml", "web/dist/profile.yaml");
    link(".systemprompt/profiles/base/profile.yaml", ".systemprompt/profiles/same/profile.yaml");
    link(".systemprompt/docker/shared_config.json", ".systemprompt/profiles/odd/profile.yaml");
    for (path, expected) in [
        ("web/dist/note.txt", Some(LeftOutReason::Ignored { line: 1 })),
        ("web/dist/open.txt", None),
        ("web/dist/config.json", Some(LeftOutReason::State)),
        ("web/dist/profile.yaml", Some(LeftOutReason::State)),
        (".systemprompt/profiles/same/profile.yaml", None),
        (".systemprompt/profiles/odd/profile.yaml", Some(LeftOutReason::State)),
    ] {
        assert_eq!(reason(&project, path), expected, "{path}");
    }
}

#[test]
fn a_folder_that_is_a_link_stays_in_the_project() {
    let outside = tempfile::tempdir().expect("dir");
    let stranger = outside.path().join("stranger");
    std::fs::create_dir(&stranger).expect("folder");
    std::fs::write(stranger.join("diary.txt"), "x").expect("write");
    let replaced = |folder: &str, target: &Path| {
        let project = Project::new();
        project.write(".git/config", "x");
        project.write(".systemprompt/docker/shared_config.json", "{}");
        project.write("other/index.html", "linked");
        project.write("other/config/config.yaml", "agents: {}\n");
        project.write("other/prod/profile.yaml", "name: prod\n");
        let path = project.path(folder);
        std::fs::create_dir_all(path.parent().expect("below the root")).expect("folders");
        let _ = std::fs::remove_dir_all(&path); // not all of them are there
        symlink(target, path).expect("link");
        project
    };
    let folders = ["web/dist", "services", "extensions/mcp", ".systemprompt/profiles"];
    for folder in folders {
        for target in [stranger.clone(), "/".into()] {
            let error = replaced(folder, &target).plan_error();
            assert!(matches!(&error, BuildError::RefusedFolder { folder: named, .. } if named == folder), "{error}");
        }
    }
    let project = replaced("core/web/dist", &stranger);
    std::fs::remove_dir_all(project.path("web")).expect("remove");
    assert!(matches!(project.plan_error(), BuildError::RefusedFolder { .. }), "the second place of the site");
    for (target, expected) in [
        ("../.git", LeftOutReason::GitData),
        ("../.systemprompt", LeftOutReason::State),
        ("../.systemprompt/docker", LeftOutReason::State),
        ("..", LeftOutReason::LinkOutside),
    ] {
        let error = replaced("web/dist", Path::new(target)).plan_error();
        assert!(matches!(&error, BuildError::RefusedFolder { why, .. } if *why == expected), "{target}: {error}");
        assert!(error.to_string().contains("web/dist"), "{error}");
    }
    for folder in folders {
        let up = "../".repeat(folder.matches('/').count());
        let project = replaced(folder, Path::new(&format!("{up}other")));
        project.plan();
        project.write(".dockerignore", "other/index.html\n");
        let shown = format!("{folder}/index.html");
        if folder != ".systemprompt/profiles" {
            assert_eq!(reason(&project, &shown), Some(LeftOutReason::Ignored { line: 1 }), "{folder}");
        }
    }
}

#[test]
fn dockerignore_is_honoured() {
    let project = Project::new();
    project.write(".dockerignore", "**/*.map\nweb/dist/drafts\n!web/dist/drafts/kept.html\n");
    project.write("web/dist/assets/app.js.map", "x");
    project.write("web/dist/drafts/a.html", "x");
    project.write("web/dist/drafts/kept.html", "x");
    assert_eq!(reason(&project, "web/dist/assets/app.js.map"), Some(LeftOutReason::Ignored { line: 1 }));
    assert_eq!(reason(&project, "web/dist/drafts/a.html"), Some(LeftOutReason::Ignored { line: 2 }));
    let paths: Vec<_> = entries(&project.build()).into_iter().map(|entry| entry.0).collect();
    assert!(paths.iter().any(|path| path == "app/web/dist/drafts/kept.html"));
}

#[test]
fn whole_secrets_are_refused_by_place_and_kind_without_their_value() {
    let project = Project::new();
    let ours = token::new_random_token(token::SYNC_PREFIX);
    project.write("services/config/keys.yaml", format!("# keys\nsync: {}\n", ours.expose()));
    project.write("web/dist/example.md", "Set ANTHROPIC_API_KEY=sk-ant-xxxxx and sp_live_abc123...");
    let error = build(&project.spec(), &project.cache()).expect_err("a secret");
    let BuildError::Secrets(findings) = &error else { panic!("{error}") };
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].path, Path::new("services/config/keys.yaml"));
    assert_eq!((findings[0].line, findings[0].kind), (2, SecretKind::SystemPromptToken));
    assert!(error.to_string().contains("services/config/keys.yaml:2"), "{error}");
    assert!(!format!("{error} {error:?}").contains(&ours.expose()[9..]), "the value is not shown");

    let again = build(&project.spec(), &project.cache()).expect_err("still a secret");
    assert!(matches!(again, BuildError::Secrets(_)), "the cache forgives nothing");
    for allowed in ["services/config/keys.yaml", "./services/config", "services"] {
        let mut spec = project.spec();
        spec.allow_secret.push(allowed.into());
        build(&spec, &project.cache()).expect(allowed);
    }
    let mut spec = project.spec();
    spec.allow_secret.push("web".into());
    assert!(matches!(build(&spec, &project.cache()), Err(BuildError::Secrets(_))), "only what was named");
}

#[test]
fn a_program_that_knows_the_prefixes_passes() {
    let project = Project::new();
    let mut spec = project.spec();
    spec.binary = std::env::current_exe().expect("this test"); // its scanner holds all of them
    build(&spec, &project.cache()).expect("no whole secret in it");
}

#[test]
fn what_is_missing_is_named() {
    let project = Project::new();
    std::fs::remove_dir_all(project.path("web")).expect("remove");
    assert!(matches!(project.plan_error(), BuildError::MissingFolder { folder: "web/dist", .. }));
    project.write("core/web/dist/index.html", "x");
    project.plan();

    project.write(".dockerignore", ".systemprompt");
    assert!(matches!(project.plan_error(), BuildError::MissingProfile { .. }));
    project.write(".dockerignore", "**/profile.yaml");
    let error = project.plan_error().to_string();
    assert!(error.contains(".dockerignore"), "{error}");
    project.write(".dockerignore", "");

    let mut spec = project.spec();
    for name in ["", "../prod", "a/b", ".hidden"] {
        spec.profile = name.into();
        let error = systemprompt_oci::ImageBuilder::new(spec.clone()).plan().expect_err(name);
        assert!(matches!(error, BuildError::ProfileName(_)), "{error}");
    }
    let mut spec = project.spec();
    spec.binary = project.path("services/config/config.yaml");
    let error = systemprompt_oci::ImageBuilder::new(spec).plan().expect_err("no program");
    assert!(error.to_string().contains("ELF"), "{error}");
}

#[test]
fn odd_names_survive() {
    let project = Project::new();
    let long = format!("{}/{}.html", "deep".repeat(30), "name".repeat(40));
    let names = ["with space.html", "ünï.html", "new\nline.html", "-dash", "a\\b", "100%.html", "'quote\"", &long];
    for name in names {
        project.write(&format!("web/dist/{name}"), name);
    }
    let found = entries(&project.build());
    for name in names {
        let path = format!("app/web/dist/{name}");
        let entry = found.iter().find(|entry| entry.0 == path).unwrap_or_else(|| panic!("{path:?}"));
        assert_eq!(entry.2, name.as_bytes());
    }
}
