//! A page of Markdown, as far as it can be checked: its links, its anchors, and what is in code type. It reads no file.

use std::collections::{BTreeMap, BTreeSet};

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// What a page has; each with its line, from 1.
#[derive(Debug, Default)]
pub struct Page {
    /// Where links and pictures lead, as they are written.
    pub links: Vec<(usize, String)>,
    /// What `#...` may name.
    pub anchors: BTreeSet<String>,
    /// Words in code type.
    pub code: Vec<(usize, String)>,
    /// Fenced blocks: language and text.
    pub blocks: Vec<(usize, String, String)>,
}

impl Page {
    /// The page of a text.
    pub fn read(text: &str) -> Self {
        let (mut page, mut heading, mut block) = (Self::default(), None::<String>, None);
        let mut headings = BTreeMap::new();
        let (mut line, mut at) = (1, 0);
        let events = Parser::new_ext(text, Options::ENABLE_TABLES | Options::ENABLE_STRIKETHROUGH);
        for (event, range) in events.into_offset_iter() {
            if let Some(passed) = text.get(at..range.start) {
                line += passed.matches('\n').count();
                at = range.start;
            }
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.links.push((line, dest_url.into_string()));
                }
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let slug = slug(&heading.take().unwrap_or_default());
                    let times: &mut usize = headings.entry(slug.clone()).or_default();
                    page.anchors.insert(if *times == 0 { slug } else { format!("{slug}-{times}") });
                    *times += 1;
                }
                Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(language))) => {
                    block = Some((line, language.into_string(), String::new()));
                }
                Event::End(TagEnd::CodeBlock) => page.blocks.extend(block.take()),
                Event::Text(text) => {
                    if let Some((_, _, into)) = &mut block {
                        into.push_str(&text);
                    }
                    if let Some(into) = &mut heading {
                        into.push_str(&text);
                    }
                }
                Event::Code(code) => {
                    if let Some(into) = &mut heading {
                        into.push_str(&code);
                    }
                    page.code.push((line, code.into_string()));
                }
                _ => {}
            }
        }
        page
    }
}

/// The anchor of a heading, as GitHub and mdBook make it.
fn slug(heading: &str) -> String {
    let kept = heading.trim().chars().filter_map(|c| match c {
        ' ' => Some('-'),
        c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
        _ => None,
    });
    kept.flat_map(char::to_lowercase).collect()
}

#[test]
fn what_a_page_has_is_found_with_its_line() {
    let page = Page::read(
        "# A `code`, it's 2\n\ntext [link](to.md#a) `named`\n\n## Twice\n\n## Twice\n\n| a |\n|---|\n| ![p](p.svg) |\n\n\
         ```yaml\na: 1\nb: 2\n```\n",
    );
    assert_eq!(page.links, [(3, "to.md#a".to_owned()), (11, "p.svg".to_owned())]);
    assert_eq!(page.anchors, BTreeSet::from(["a-code-its-2", "twice", "twice-1"].map(str::to_owned)));
    assert_eq!(page.code, [(1, "code".to_owned()), (3, "named".to_owned())]);
    assert_eq!(page.blocks, [(13, "yaml".to_owned(), "a: 1\nb: 2\n".to_owned())]);
}
